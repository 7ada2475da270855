"""Store: the output folder on any fsspec filesystem. What it writes is there whole, or not at all.

Object stores: one PUT, or above 100 MiB a multipart upload that s3fs completes or aborts; an object
is visible only when complete. Locally: a temporary name in the same folder, fsync, rename, fsync of
the folder. Names are relative to the store's root everywhere, `names` included.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fsspec
import pyarrow.fs
from botocore.exceptions import ClientError

from operators.stores import LOCAL, S3, classify, filesystem, protocol, redact, split_bucket

DELETE_AT_ONCE = 1000  # S3's limit
# Before objects are tried again that a request did not delete: each counts towards S3's 3500 a second.
DELETE_WAITS_S = (1.0, 4.0, 16.0)


class Store:
    """A folder by URI. Holds the URI and options only, so it pickles."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any]) -> None:
        self._uri = uri.rstrip("/") or "/"
        self._options = dict(storage_options)

    def write(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whole or not at all, in place of what was there."""
        store, path = self._at(name)
        if self._local:
            _write_local(path, data)
        elif self._s3:
            store.pipe_file(path, data)
        else:
            store.makedirs(path.rpartition("/")[0], exist_ok=True)
            store.pipe_file(path, data)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        store, path = self._at(name)
        data: bytes = store.cat_file(path)
        return data

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Every file below `folder`, sorted, as names for `read`; a missing folder has none.

        Raises OSError where a folder cannot be listed.
        """
        store, root = self._at("")
        below = f"{root}/{folder}".rstrip("/")
        if self._local:
            found = [
                os.path.join(place, name)
                for place, _, names in os.walk(below, onerror=_unlisted)
                for name in names
            ]
        elif self._s3:
            bucket, key = split_bucket(store, below)
            pages = s3_pages(store, bucket, f"{key}/" if key else "")
            found = [
                f"{bucket}/{item['Key']}"
                for page in pages
                for item in page
                if not item["Key"].endswith("/")
            ]
        else:
            try:
                found = store.find(below)
            except FileNotFoundError:
                found = []
        names = (path[len(root) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(suffix) and not _unfinished(name))

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; one that is gone already is no error."""
        paths = [self._at(name)[1] for name in names]
        store, _ = self._at("")
        if self._s3:
            for start in range(0, len(paths), DELETE_AT_ONCE):
                _delete_s3(store, paths[start : start + DELETE_AT_ONCE])
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                store.rm_file(path)

    def url(self, name: str = "") -> str:
        """Where people find it; without credentials."""
        _, path = self._at(name)
        if self._local:
            return path
        return redact(f"{self._uri}/{name}" if name else self._uri)

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The same folder for pyarrow datasets and ray.data.read_parquet: filesystem, root path."""
        store, root = self._at("")
        if self._local:
            return pyarrow.fs.LocalFileSystem(), root
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store)), root

    @property
    def _local(self) -> bool:
        return protocol(self._uri) in LOCAL

    @property
    def _s3(self) -> bool:
        return protocol(self._uri) in S3

    def _at(self, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
        store, root = filesystem(self._uri, self._options)
        return store, f"{root.rstrip('/')}/{name}" if name else root


def s3_pages(
    store: fsspec.AbstractFileSystem, bucket: str, prefix: str
) -> Iterator[list[dict[str, Any]]]:
    """The objects under `prefix` in key order, page by page: one request and 1000 objects each."""
    more: dict[str, str] = {}
    while True:
        page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        yield page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _delete_s3(store: fsspec.AbstractFileSystem, paths: list[str]) -> None:
    bucket, _ = split_bucket(store, paths[0])
    keys = [split_bucket(store, path)[1] for path in paths]
    for wait_s in (*DELETE_WAITS_S, 0.0):
        objects = [{"Key": key} for key in keys]
        answer = store.call_s3(
            "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
        )
        keys = []
        # s3fs's own bulk delete does not look at these.
        for fault in answer.get("Errors", []):
            if fault.get("Code") == "NoSuchKey":  # AWS does not say so, others may
                continue
            error = _not_deleted(bucket, fault)
            if not (wait_s and classify(error)[1]):
                raise error
            keys.append(fault["Key"])
        if not keys:
            return
        time.sleep(wait_s)


def _not_deleted(bucket: str, fault: dict[str, str]) -> OSError:
    """As s3fs raises what a whole request is refused with."""
    kind = PermissionError if fault.get("Code") == "AccessDenied" else OSError
    error = kind(f"s3://{bucket}/{fault['Key']}: not deleted: {fault.get('Code')}")
    error.__cause__ = ClientError({"Error": fault}, "DeleteObjects")
    return error


def _unlisted(error: OSError) -> None:
    # os.walk passes over it otherwise: a ledger that cannot be listed would pass for an empty one
    if not isinstance(error, FileNotFoundError):
        raise error


def _unfinished(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".tmp")


def _write_local(path: str, data: bytes) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
