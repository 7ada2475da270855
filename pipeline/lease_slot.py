"""lease.json in one kind of store: read it, and put a new one in its place only if it is still the same.

S3           a conditional PUT (If-None-Match, If-Match); a compatible store may not know it
local disk   replaced under a file lock, which the kernel lets go of when its process ends
any other    looks, then writes
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from typing import Any, Protocol

from fsspec.asyn import sync

from operators.stores import LOCAL, S3, filesystem, http_status, local_path, protocol, split_bucket
from pipeline.store import Store

NAME = "lease.json"
# HTTP: the condition did not hold; this store knows no conditions.
REFUSED, UNSUPPORTED = (409, 412), (400, 405, 501)

Found = tuple[bytes, str]  # content and tag


class Slot(Protocol):
    """One writer at a time may hold what is written here."""

    def read(self) -> Found | None:
        """Content and tag; None where there is none."""

    def put(self, data: bytes, tag: str | None) -> None:
        """Write if the tag is still the one there (None: if nothing is); refused in silence."""

    def conditional(self) -> bool:
        """Whether `put` kept its condition. Asked by the holder, after a put."""


def open_slot(uri: str, options: Mapping[str, Any]) -> Slot:
    """The slot of an output folder."""
    if protocol(uri) in LOCAL:
        return _LocalSlot(local_path(uri), {})
    return (_S3Slot if protocol(uri) in S3 else _PlainSlot)(uri.rstrip("/"), options)


class _PlainSlot:
    """Looks, then writes. The content is its own tag: each claim has other times."""

    def __init__(self, folder: str, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._store = Store(folder, options)

    def read(self) -> Found | None:
        try:
            data = self._store.read(NAME)
        except FileNotFoundError:
            return None
        return data, data.decode("latin-1")

    def put(self, data: bytes, tag: str | None) -> None:
        found = self.read()
        if (None if found is None else found[1]) == tag:
            self._store.write(NAME, data)

    def conditional(self) -> bool:
        return False


class _LocalSlot(_PlainSlot):
    """The same under a lock."""

    def put(self, data: bytes, tag: str | None) -> None:
        os.makedirs(self._folder, exist_ok=True)
        # Never removed: a lock on a file that has lost its name would lock nobody out.
        with open(os.path.join(self._folder, "lease.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().put(data, tag)

    def conditional(self) -> bool:
        return True


class _S3Slot:
    """An object. Its ETag is the tag."""

    def __init__(self, folder: str, options: Mapping[str, Any]) -> None:
        self._s3, path = filesystem(f"{folder}/{NAME}", options)
        self._bucket, self._key = split_bucket(self._s3, path)
        self._unsupported = False

    def read(self) -> Found | None:
        try:
            # The bytes and their tag in one request, or the tag might be of other bytes.
            answer = self._s3.call_s3("get_object", Bucket=self._bucket, Key=self._key)
        except FileNotFoundError:
            return None
        return sync(self._s3.loop, answer["Body"].read), answer["ETag"]

    def put(self, data: bytes, tag: str | None) -> None:
        self._put(data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})

    def conditional(self) -> bool:
        """Creates what is there already: a store that lets it pass does not look at conditions."""
        found = self.read()
        if not self._unsupported and found is not None:
            self._unsupported = self._put(found[0], {"IfNoneMatch": "*"})
        return not self._unsupported

    def _put(self, data: bytes, condition: dict[str, str]) -> bool:
        if self._unsupported:
            condition = {}
        try:
            self._s3.call_s3(
                "put_object", Bucket=self._bucket, Key=self._key, Body=data, **condition
            )
        except OSError as error:
            status = http_status(error)
            if condition and status in UNSUPPORTED:
                self._unsupported = True
                return self._put(data, {})
            if status in REFUSED or isinstance(error, FileNotFoundError):
                return False
            raise
        return True
