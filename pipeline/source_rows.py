"""The source's rows: identity of an asset, and batches of FOUND.

normalise(uri)     one spelling for a file, and no character of an object's key changed
path_in(uri)       what names the file: of a tar member its path in the shard
asset_id(...)      32 hex digits
Skipped            what was passed over, counted by reason
in_batches(rows)   a small first batch, then 8192 rows each
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from operators.schema import FOUND
from operators.stores import (
    LOCAL,
    STORE_FAULTS,
    StoreError,
    classify,
    faults_of,
    local_path,
    protocol,
    reason,
    redact,
    split_member,
    unsigned,
)
from pipeline.config import ConfigError

FIRST_ROWS = 256  # a progress line after a quarter of an S3 page, not after eight
BATCH_ROWS = 8192
MAX_REASONS = 40  # a folder of core dumps has an extension a file; memory must not
OTHER = "unknown type (others)"


class SourceError(ConfigError):
    """The input cannot be listed. The message says what is wrong and what to do."""


class Skipped(Counter[str]):
    """Counts by reason, with a bounded number of reasons. Tar shards add from several threads."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(counts or {})
        self._lock = threading.Lock()

    def add(self, why: str) -> None:
        with self._lock:
            self[why if why in self or len(self) < MAX_REASONS else OTHER] += 1

    def unknown_type(self, name: str) -> None:
        kind = extension(name)
        short = kind if len(kind) <= 10 and kind.isprintable() else "(others)"
        self.add(f"unknown type {short or '(none)'}")


@dataclass(frozen=True, slots=True)
class Asset:
    """A row of FOUND without its hash and modality. `fetch_uri` is what opens it."""

    fetch_uri: str
    version: str = ""
    size_bytes: int | None = None
    # given where it is not the fetch_uri: a tar member
    uri: str | None = None
    fetch_offset: int | None = None
    fetch_length: int | None = None
    source_id: str | None = None
    variables: str | None = None


def extension(name: str) -> str:
    """Lower-case extension with its dot, "" without one."""
    last = name.rpartition("/")[2]
    stem, dot, kind = last.rpartition(".")
    return f".{kind.lower()}" if dot and stem else ""


def normalise(uri: str) -> str:
    """One spelling for each file: a local one as a plain absolute path, a scheme in lower case.

    Everything after the scheme of a store stays as given: S3 keys may hold //, spaces, #, ? and %.
    """
    scheme = protocol(uri)
    if scheme in LOCAL:
        return local_path(uri)
    return scheme + uri[len(scheme) :]


def path_in(uri: str) -> str:
    """The URI of an asset without what precedes the file: `tar://member::shard` is its member."""
    member, _ = split_member(uri)
    return member.removeprefix("tar://") if member else uri


def asset_id(
    uri: str, version: str = "", source_id: str | None = None, variables: str | None = None
) -> str:
    """BLAKE2b, 16 bytes as hex, over the length-prefixed UTF-8 of the four; None counts as ""."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (uri, version, source_id or "", variables or ""):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def version_of(info: Mapping[str, object]) -> str:
    """An fsspec or S3 entry's version: its etag, otherwise size and time of change."""
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).removeprefix("W/").strip('"')
    changed = next(
        (
            info[name]
            for name in ("mtime", "LastModified", "last_modified", "created")
            if info.get(name)
        ),
        "",
    )
    size = info.get("size")
    return f"{'' if size is None else size}-{changed}" if changed else ""


def in_batches(
    assets: Iterable[Asset], modality: str, skipped: Skipped
) -> Iterator[pa.RecordBatch]:
    """FOUND batches in the order of `assets`."""
    rows: list[tuple[object, ...]] = []
    most = FIRST_ROWS
    for asset in assets:
        # Results must not show who may read the file, and a URL signed anew is the same asset.
        uri = unsigned(asset.uri or asset.fetch_uri)
        try:
            identity = asset_id(uri, asset.version, asset.source_id, asset.variables)
        except UnicodeEncodeError:  # a local name of bytes that are no UTF-8: no Arrow string
            skipped.add("file name is not UTF-8")
            continue
        row = (
            identity,
            uri,
            asset.fetch_uri,
            asset.fetch_offset,
            asset.fetch_length,
            asset.version,
            asset.size_bytes,
            modality,
            asset.source_id,
            asset.variables,
        )
        rows.append(row)
        if len(rows) == most:
            yield _batch(rows)
            rows, most = [], BATCH_ROWS
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[object, ...]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [
        pa.array(list(column), field.type) for column, field in zip(columns, FOUND, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=FOUND)


def listing_faults(uri: str) -> tuple[type[Exception], ...]:
    """What listing or opening `uri` raises when its store fails, or cannot be had."""
    try:
        own = faults_of(uri) if protocol(uri) in ("gs", "gcs") else STORE_FAULTS
    except ImportError:  # without gcsfs there is no such store
        own = STORE_FAULTS
    return (*own, StoreError)


ADVICE = {
    "fetch.not_found": "does not exist; check the spelling, the bucket and the endpoint",
    "fetch.forbidden": "may not be read; check the credentials and their rights to list and read",
    "fetch.timeout": "does not answer; check the endpoint and the network",
    "fetch.unavailable": "cannot be reached; check the endpoint and the network",
}


def refusal(uri: str, error: Exception) -> SourceError:
    """A store's fault as the SourceError that the user reads."""
    if isinstance(error, StoreError):
        return SourceError(str(error))
    code, _ = classify(error)
    if isinstance(error, NotADirectoryError):
        return SourceError(f"{redact(uri)}: is a file; say which input.kind (file, manifest, tar)")
    advice = ADVICE.get(code, ADVICE["fetch.unavailable"])
    return SourceError(f"{redact(uri)}: {advice} ({reason(error)})")
