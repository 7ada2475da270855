"""Listing: every file below a prefix, one after the other, never all of them in memory.

S3 is paged (one request a thousand objects), local folders are read one at a time in sorted order,
other stores folder by folder. Also `stat_asset`: the version of one file that somebody else named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from operators.schema import MISSING
from operators.stores import (
    HTTP,
    LOCAL,
    S3,
    StoreError,
    classify,
    filesystem,
    local_path,
    protocol,
    split_bucket,
)
from pipeline.source_rows import Asset, Skipped, SourceError, listing_faults, refusal, version_of
from pipeline.store import s3_pages

# What one request brings of a manifest or tar shard. Tar members below it are read in passing,
# larger ones are seeked over. 1 MiB: about 1000 requests and half a minute for a 1 GiB shard of
# small pictures, where a request for each header takes minutes.
WINDOW_BYTES = 1 << 20
STAT_RETRIES = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A file and its name below the prefix."""

    name: str
    asset: Asset


def entries(
    prefix: str,
    storage_options: Mapping[str, Any],
    skipped: Skipped,
    excluded: Callable[[str], bool],
    allow_missing: bool = False,
) -> Iterator[Entry]:
    """Every file below `prefix`. Raises SourceError, also in the midst of it: a listing that lacks
    a folder would pass for a whole one. Only an unreadable folder that is `excluded` may lack.

    Object stores have no empty folders, so there a prefix without a key does not exist;
    `allow_missing` lets it pass.
    """
    scheme = protocol(prefix)
    try:
        if scheme in LOCAL:
            yield from _local(local_path(prefix), "", (), skipped, excluded)
            return
        store, path = filesystem(prefix, storage_options)
        if scheme in S3:
            yield from _s3(store, scheme, path, allow_missing)
        else:
            yield from _walk(store, path.rstrip("/"), path.rstrip("/"), frozenset())
    except listing_faults(prefix) as error:
        raise refusal(prefix, error) from error


def _s3(
    store: fsspec.AbstractFileSystem, scheme: str, path: str, allow_missing: bool
) -> Iterator[Entry]:
    bucket, key = split_bucket(store, path)
    prefix = key if not key or key.endswith("/") else f"{key}/"
    exists = not prefix or allow_missing
    for page in s3_pages(store, bucket, prefix):
        for item in page:
            exists = True
            key = item["Key"]
            if key.endswith("/"):  # how consoles mark an empty folder
                continue
            asset = Asset(f"{scheme}://{bucket}/{key}", version_of(item), item["Size"])
            yield Entry(key[len(prefix) :], asset)
    if not exists:
        raise SourceError(
            f"{scheme}://{bucket}/{prefix}: does not exist; check the spelling"
            " (a single object wants input.kind: file; a prefix that may be empty, allow_empty)"
        )


def _local(
    folder: str,
    name: str,
    above: tuple[tuple[int, int], ...],
    skipped: Skipped,
    excluded: Callable[[str], bool],
) -> Iterator[Entry]:
    try:
        here = os.stat(folder)
        # A link to a folder above would never end.
        if (here.st_dev, here.st_ino) in above:
            skipped.add("link to a folder above it")
            return
        with os.scandir(folder) as found:
            inside = sorted((entry.name, _is_folder(entry)) for entry in found)
    except OSError as error:
        if name and isinstance(error, FileNotFoundError):
            skipped.add("folder that went while it was listed")
            return
        if name and isinstance(error, PermissionError) and excluded(name):
            skipped.add("excluded")
            return
        raise refusal(folder, error) from error
    above = (*above, (here.st_dev, here.st_ino))
    for last, is_folder in inside:
        path = os.path.join(folder, last)
        if is_folder:
            yield from _local(path, f"{name}{last}/", above, skipped, excluded)
        else:
            try:
                status = _stat(path)
            except OSError as error:
                if not (is_rows_own(error) or excluded(name + last)):
                    raise refusal(path, error) from error
                # gone, forbidden, or a link to nothing: the fetch gives it its code
                yield Entry(name + last, Asset(path))
                continue
            if stat.S_ISREG(status.st_mode):
                yield Entry(name + last, _local_asset(path, status))
            else:
                skipped.add("not a regular file")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if classify(error)[0] != "fetch.not_found":
            raise
        return False  # a link to itself, or to a name that is too long


def _stat(path: str) -> os.stat_result:
    """os.stat, asked again where a network's or a bucket's mount had a hiccup."""
    try:
        return os.stat(path)
    except OSError as error:
        if not classify(error)[1]:
            raise
    # Not from the start: the retrying costs 0.2 ms a file, the stat itself 0.01 ms.
    again = Retrying(
        stop=stop_after_attempt(STAT_RETRIES),
        wait=wait_random_exponential(multiplier=0.1, max=1),
        retry=retry_if_exception(lambda error: classify(error)[1]),
        reraise=True,
    )
    return again(os.stat, path)


def _local_asset(path: str, status: os.stat_result) -> Asset:
    return Asset(path, f"{status.st_size}-{status.st_mtime_ns}", status.st_size)


def _walk(
    store: fsspec.AbstractFileSystem, root: str, folder: str, above: frozenset[str]
) -> Iterator[Entry]:
    for info in sorted(store.ls(folder, detail=True), key=lambda info: str(info["name"])):
        path = info["name"].rstrip("/")
        # An HTML index links to its parent and to itself.
        if not path.startswith(f"{root}/") or path in above:
            continue
        if info["type"] == "directory":
            yield from _walk(store, root, info["name"], above | {path})
        else:
            uri = str(store.unstrip_protocol(info["name"]))
            yield Entry(path[len(root) + 1 :], Asset(uri, version_of(info), info["size"]))


def stat_asset(asset: Asset, storage_options: Mapping[str, Any], must_exist: bool = False) -> Asset:
    """`asset` with the version and size that its store names, in one request.

    A file that is missing or forbidden keeps its row (the fetch gives it its code) unless it
    `must_exist`. Missing is a version: when the file comes back it has another, and is another
    asset. An http(s) one stays as it is. A store or a disk that does not answer is a SourceError:
    without the version the same file would pass for another asset.
    """
    uri = asset.fetch_uri
    scheme = protocol(uri)
    if scheme in HTTP:
        return asset
    try:
        if scheme in LOCAL:
            status = _stat(uri)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(uri)
            found = _local_asset(uri, status)
            version, size = found.version, found.size_bytes
        else:
            store, path = filesystem(uri, storage_options)
            if scheme in S3:
                info = _s3_head(store, path)
                version, size = version_of(info), int(info["ContentLength"])
            else:
                info = store.info(path)
                version, size = version_of(info), info["size"]
    except listing_faults(uri) as error:
        if must_exist or not is_rows_own(error):
            raise refusal(uri, error) from error
        gone = not isinstance(error, StoreError) and classify(error)[0] == "fetch.not_found"
        return replace(asset, version=MISSING) if gone else asset
    return replace(asset, version=version, size_bytes=size)


def _s3_head(store: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """ETag and ContentLength of an object in one request (s3fs's `info` makes two of a miss)."""
    bucket, key = split_bucket(store, path)
    head: dict[str, Any] = store.call_s3("head_object", Bucket=bucket, Key=key)
    return head


def opened(uri: str, storage_options: Mapping[str, Any]) -> IO[bytes]:
    """`uri` for reading and seeking, through a window of WINDOW_BYTES."""
    if protocol(uri) in LOCAL:
        return open(local_path(uri), "rb")
    store, path = filesystem(uri, storage_options)
    file: IO[bytes] = store.open(path, "rb", block_size=WINDOW_BYTES, cache_type="readahead")
    return file


def is_rows_own(error: Exception) -> bool:
    """Whether the fetch will say the same of this one file, and not the store of all of them."""
    own = ("fetch.not_found", "fetch.forbidden")
    return isinstance(error, StoreError) or classify(error)[0] in own
