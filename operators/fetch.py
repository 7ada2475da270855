"""Fetch: from a reference to bytes, over any fsspec store. The second step of the way.

One attempt is one request with one time limit; the stores' own hidden retries are switched off, so
that `attempts` counts what happened. Thread-safe: requests run on fsspec's event loop, callers
wait. A local read has no time limit: nothing can interrupt a thread that waits for a disk.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import fsspec.asyn
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from operators.errors import MediaError
from operators.settings import FetchSettings
from operators.stores import (
    HTTP,
    LOCAL,
    S3,
    StoreError,
    classify,
    faults_of,
    filesystem,
    local_path,
    options_for,
    protocol,
    reason,
    redact,
    split_bucket,
)

CHUNK_BYTES = 1 << 20


class FetchError(MediaError):
    """A MediaError that knows how many attempts were made."""

    def __init__(self, code: str, message: str, attempts: int) -> None:
        super().__init__(code, message)
        self.attempts = attempts

    def __reduce__(self) -> tuple[type[MediaError], Any]:
        return FetchError, (self.code, self.message, self.attempts)


@dataclass(frozen=True)
class Ref:
    """Where the bytes are: a whole object, or `length` bytes of it from `offset` (a tar member)."""

    uri: str
    offset: int | None = None
    length: int | None = None
    size_bytes: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Ref:
        """From a row of FOUND or PLAN."""
        return cls(row["fetch_uri"], row["fetch_offset"], row["fetch_length"], row["size_bytes"])

    @property
    def planned(self) -> int | None:
        return self.size_bytes if self.length is None else self.length


@dataclass(frozen=True)
class Fetched:
    """The bytes, the attempts they took, and the seconds with all waiting between attempts."""

    data: bytes
    attempts: int
    seconds: float


class LongerError(Exception):
    """The object has more bytes than may be read."""


class Fetch:
    """`ref -> Fetched`. Pickles: it holds settings only, the connections are fsspec's."""

    def __init__(self, settings: FetchSettings, storage_options: Mapping[str, Any]) -> None:
        self._settings = settings
        self._options = storage_options

    def __call__(self, ref: Ref) -> Fetched:
        """Read `ref`. Raises FetchError (a MediaError) with a fetch.* code."""
        started = time.monotonic()
        limit = self._settings.max_bytes
        if ref.planned is not None and ref.planned > limit:
            raise _too_large(ref, limit, 0)
        if ref.length == 0:  # no range means "nothing", so there is nothing to ask for
            return Fetched(b"", 0, 0.0)
        try:
            read = self._reader(ref)
        except StoreError as error:
            raise FetchError("fetch.unavailable", str(error), 0) from error
        retrying = Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            # AWS's "full jitter": after n failures a random wait up to 0.5 * 2^n s, at most 30 s
            wait=wait_random_exponential(multiplier=0.5, max=30),
            retry=retry_if_exception(lambda error: classify(error)[1]),
            reraise=True,
        )
        data = None
        try:
            data = retrying(read, limit if ref.planned is None else ref.planned)
        except LongerError:
            if ref.planned is None:
                raise _too_large(ref, limit, _attempts(retrying)) from None
        except faults_of(ref.uri) as error:
            code, _ = classify(error)
            message = f"{redact(ref.uri)}: {reason(error)}"
            raise FetchError(code, message, _attempts(retrying)) from error
        if data is None or (ref.planned is not None and len(data) != ref.planned):
            found = "more" if data is None else str(len(data))
            message = f"{redact(ref.uri)}: {ref.planned} bytes were listed, {found} are there"
            raise FetchError("fetch.changed", message, _attempts(retrying))
        return Fetched(data, _attempts(retrying), time.monotonic() - started)

    def _reader(self, ref: Ref) -> Callable[[int], bytes]:
        """What makes one attempt: reads at most so many bytes, raises the store's own errors."""
        scheme, timeout = protocol(ref.uri), self._settings.timeout_s
        if scheme in LOCAL:
            path = local_path(ref.uri)
            return lambda most: _read_local(path, ref, most)
        if scheme in S3:
            # Our own instance: s3fs would try 5 times, and botocore 5 times in each of them.
            config = {
                "connect_timeout": min(10.0, timeout),
                "read_timeout": timeout,
                "max_pool_connections": max(10, self._settings.concurrency),
                "retries": {"mode": "standard", "total_max_attempts": 1},
            }
            own = options_for(scheme, self._options)
            options = {**own, "config_kwargs": {**config, **own.get("config_kwargs", {})}}
            store, path = filesystem(ref.uri, options)
            store.retries = 1
            read: Callable[..., Awaitable[bytes]] = _read_s3
        else:
            store, path = filesystem(ref.uri, self._options)
            if scheme in HTTP:
                read = _read_http
            elif store.async_impl:
                read = _read_async
            else:
                return lambda most: _read_file(store, path, ref, most)
        return lambda most: bytes(
            fsspec.asyn.sync(store.loop, read, store, path, ref, most, timeout=timeout)
        )


def _attempts(retrying: Retrying) -> int:
    return int(retrying.statistics["attempt_number"])


def _too_large(ref: Ref, limit: int, attempts: int) -> FetchError:
    size = f"more than {limit}" if ref.planned is None else str(ref.planned)
    message = f"{redact(ref.uri)}: {size} bytes, fetch.max_bytes is {limit}"
    return FetchError("fetch.too_large", message, attempts)


# One attempt each: at most `most` bytes, LongerError where there are more. A range asks for no more
# than its length, so its object may be longer; a store that sends all of it is refused.


def _read_local(path: str, ref: Ref, most: int) -> bytes:
    if "\0" in path:
        raise FileNotFoundError(errno.ENOENT, "no file name")
    # Opening a pipe would wait for its writer, so look first.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "not a file")
    with open(path, "rb") as file:
        return _read_seekable(file, ref, most, os.fstat(file.fileno()).st_size)


def _read_file(store: fsspec.AbstractFileSystem, path: str, ref: Ref, most: int) -> bytes:
    with store.open(path, "rb") as file:
        return _read_seekable(file, ref, most, file.seek(0, os.SEEK_END))


def _read_seekable(file: IO[bytes], ref: Ref, most: int, size: int) -> bytes:
    if ref.offset is None and size > most:
        raise LongerError
    file.seek(ref.offset or 0)
    # read(n) allocates n bytes at once, so ask for no more than there are
    data = file.read(min(most, max(0, size - (ref.offset or 0))) + (ref.offset is None))
    return _within(data, most)


async def _read_s3(store: fsspec.AbstractFileSystem, path: str, ref: Ref, most: int) -> bytes:
    bucket, key = split_bucket(store, path)
    if not key:
        raise IsADirectoryError(errno.EISDIR, "a bucket")
    ranged = {} if ref.offset is None else {"Range": _range(ref)}
    response = await store._call_s3("get_object", Bucket=bucket, Key=key, **ranged)
    async with response["Body"] as body:
        return await _read_body(body.read, response["ContentLength"], most)


async def _read_http(store: fsspec.AbstractFileSystem, path: str, ref: Ref, most: int) -> bytes:
    try:
        url = store.encode_url(path)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "no valid URL") from error
    session = await store.set_session()
    options = dict(store.kwargs)
    # A compressed answer would make lengths and ranges mean something else.
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    if url.user is not None:  # what the row says comes first; aiohttp refuses both
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
    if ref.offset is not None:
        headers["Range"] = _range(ref)
    async with session.get(url, headers=headers, **options) as response:
        response.raise_for_status()
        if ref.offset and response.status != 206:
            raise OSError(errno.ENOTSUP, "the server knows no ranges")
        return await _read_body(response.content.read, response.content_length, most)


async def _read_async(store: fsspec.AbstractFileSystem, path: str, ref: Ref, most: int) -> bytes:
    info = await store._info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, "a folder")
    if ref.offset is None or ref.length is None:
        if info["size"] > most:
            raise LongerError
        return bytes(await store._cat_file(path))
    end = min(ref.offset + ref.length, info["size"])
    return (
        bytes(await store._cat_file(path, start=ref.offset, end=end)) if end > ref.offset else b""
    )


async def _read_body(
    read: Callable[[int], Awaitable[bytes]], announced: int | None, most: int
) -> bytes:
    if announced is not None and announced > most:
        raise LongerError
    data = bytearray()
    while len(data) <= most:
        chunk = await read(min(CHUNK_BYTES, most + 1 - len(data)))
        if not chunk:
            return bytes(data)
        data += chunk
    raise LongerError


def _within(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise LongerError
    return data


def _range(ref: Ref) -> str:
    if ref.offset is None or ref.length is None:
        raise ValueError("a range needs offset and length")
    return f"bytes={ref.offset}-{ref.offset + ref.length - 1}"
