"""Source: what is to be captioned, as a stream of assets. The first step of the way.

    prefix    every file below it, by include and exclude globs or the task's own file types
    file      one file
    manifest  rows that name files                        pipeline/manifest.py
    tar       members of WebDataset shards                pipeline/tar_index.py

A `*` or `{a,b}` in the URI is a glob: the folders before it are the prefix. `?` and `[` alone are
names, because keys and signed URLs hold them. Globs are relative to the prefix, `**` spans folders.
Rows may name a file twice (pipeline/plan.py keeps one); nothing here makes a second row of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

import pyarrow as pa
from wcmatch import glob
from wcmatch._wcparse import PatternLimitException

from operators.stores import HTTP, LOCAL, local_path, protocol, redact
from pipeline.config import InputConfig, Modality
from pipeline.manifest import MANIFESTS, manifest_assets
from pipeline.source_list import entries, stat_asset
from pipeline.source_rows import (
    Asset,
    Skipped,
    SourceError,
    extension,
    in_batches,
    normalise,
)
from pipeline.tar_index import tar_assets

GLOB = re.compile(r"\*|\{[^{}/]*(?:,|\.\.)[^{}/]*\}")
MAGIC = re.compile(r"[*?\[{]")
GLOB_FLAGS = glob.GLOBSTAR | glob.BRACE | glob.DOTGLOB | glob.FORCEUNIX
TAR = frozenset({".tar"})
COMPRESSED_TAR = re.compile(r"\.(?:tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
MAX_PATTERNS = 10_000  # what {0000..9999} expands to


# Extensions that a prefix without input.include takes, by modality.
EXTENSIONS: dict[Modality, frozenset[str]] = {
    "image": frozenset(
        {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
        | {".heic", ".heif", ".hif"}
    ),
    # and the sound tracks of videos
    "audio": frozenset(
        {".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".wma", ".aiff", ".aif"}
        | {".amr", ".caf", ".mka", ".webm", ".mp4", ".mov", ".mkv", ".avi"}
    ),
    "video": frozenset(
        {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"}
        | {".wmv", ".asf", ".flv", ".3gp", ".ogv", ".mxf"}
    ),
}


class Source:
    """The assets that one `input:` section means, for one modality.

    `skipped` counts by reason what was passed over, while `batches` goes on and after it.
    """

    def __init__(self, input: InputConfig, modality: Modality) -> None:
        self._input = input
        self._modality = modality
        self._extensions = EXTENSIONS[modality]
        self.skipped = Skipped()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """FOUND batches of at most 8192 rows, the first one small and soon. Raises SourceError."""
        self.skipped.clear()
        return in_batches(self._assets(), self._modality, self.skipped)

    def _assets(self) -> Iterator[Asset]:
        given = self._input
        kind, prefix, pattern = self._kind()
        if pattern and given.include and kind == "prefix":
            raise SourceError(
                f"{redact(given.uri)}: a glob in input.uri and input.include; give one of them"
            )
        if kind == "manifest":
            if given.include or given.exclude:
                raise SourceError(
                    f"{redact(given.uri)}: input.include and exclude are for prefixes and tar shards;"
                    " every row of a manifest is taken"
                )
            return manifest_assets(given, self.skipped)
        if kind == "file":
            return iter([self._single(given.uri)])
        if kind == "prefix":
            wanted = self._filter((pattern,) if pattern else given.include, self._extensions)
            return self._below(prefix, wanted)
        if pattern or not _name(given.uri).lower().endswith(".tar"):
            shards = self._below(prefix, self._filter((pattern,) if pattern else (), TAR))
        else:
            shards = iter([self._single(given.uri)])
        wanted = self._filter(given.include, self._extensions)
        return tar_assets(shards, wanted, given.storage_options, self.skipped)

    def _kind(self) -> tuple[str, str, str]:
        """Kind, prefix, and the glob below the prefix ("" without one)."""
        uri, kind = self._input.uri, self._input.kind
        prefix, pattern = split_glob(uri) if kind in ("auto", "prefix", "tar") else (uri, "")
        name = pattern or _name(uri)
        if kind in ("auto", "tar") and COMPRESSED_TAR.search(name):
            raise SourceError(f"{redact(uri)}: a compressed tar has no ranges; unpack it to .tar")
        if kind != "auto":
            return kind, prefix, pattern
        if name.lower().endswith(".tar"):
            return "tar", prefix, pattern
        if pattern or (protocol(uri) in LOCAL and os.path.isdir(local_path(uri))):
            return "prefix", prefix, pattern
        if name.lower().endswith(MANIFESTS):
            return "manifest", prefix, pattern
        return ("file" if extension(name) in self._extensions else "prefix"), prefix, pattern

    def _single(self, uri: str) -> Asset:
        return stat_asset(Asset(normalise(uri)), self._input.storage_options, must_exist=True)

    def _below(self, prefix: str, wanted: Callable[[str], bool]) -> Iterator[Asset]:
        found = entries(
            normalise(prefix),
            self._input.storage_options,
            self.skipped,
            _matcher(self._input.exclude),
            self._input.allow_empty,
        )
        return (entry.asset for entry in found if wanted(entry.name))

    def _filter(self, include: Sequence[str], extensions: frozenset[str]) -> Callable[[str], bool]:
        """Whether a name is taken, by globs or else by its type; counts those that are not."""
        excluded, included = _matcher(self._input.exclude), _matcher(include)

        def wanted(name: str) -> bool:
            if excluded(name):
                self.skipped.add("excluded")
            elif include:
                if included(name):
                    return True
                self.skipped.add("not in include")
            elif extension(name) in extensions:
                return True
            else:
                self.skipped.unknown_type(name)
            return False

        return wanted


def _name(uri: str) -> str:
    return urlsplit(uri).path if protocol(uri) in HTTP else uri


def split_glob(uri: str) -> tuple[str, str]:
    """Prefix and glob of a URI; the glob is "" where the URI is a plain name."""
    if protocol(uri) in HTTP and re.search(r"[?#]", uri):
        return uri, ""
    if not GLOB.search(uri) or (protocol(uri) in LOCAL and os.path.lexists(local_path(uri))):
        return uri, ""
    scheme, separator, path = uri.rpartition("://")
    parts = path.split("/")
    first = next(place for place, part in enumerate(parts) if MAGIC.search(part))
    if protocol(uri) not in LOCAL and first == 0:
        raise SourceError(f"{redact(uri)}: the bucket or host must be named, not a glob")
    folder = "/".join(parts[:first]) + "/" if first else "."
    return scheme + separator + folder, "/".join(parts[first:])


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    if not patterns:
        return lambda name: False
    try:
        compiled = glob.compile(list(patterns), flags=GLOB_FLAGS, limit=MAX_PATTERNS)
    except PatternLimitException as error:
        raise SourceError(f"input.include or exclude: {error}") from error
    return lambda name: bool(compiled.match(name))
