"""Fetch: from a reference to bytes, over any fsspec store. The second step of the way.

One attempt is one request with one time limit; the stores' own hidden retries are switched off, so
that `attempts` counts what happened. Thread-safe: requests run on fsspec's event loop, callers
wait. A local read has no time limit: nothing can interrupt a thread that waits for a disk.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import aiohttp
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
# A large object is read in parts of so many bytes, each within the time limit.
PART_BYTES = 16 << 20
# What tells one state of an object from the next, under the names that stores give it.
MARKS = ("ETag", "etag", "LastModified", "mtime", "updated")

T = TypeVar("T")


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
    """The bytes, and the attempts they took."""

    data: bytes
    attempts: int


@dataclass(frozen=True)
class State:
    """What a store says of an object: its bytes (None: unknown), and what differs once they do.

    ranges: whether parts of it can be read.
    """

    size: int | None
    ranges: bool
    marks: tuple[str, ...]


class LongerError(Exception):
    """The object has more bytes than may be read."""


class DiskError(Exception):
    """This node could not write what the store sent: a broken machine, no fault of the store's."""


class Fetch:
    """`ref -> Fetched`. Pickles: it holds settings only, the connections are fsspec's."""

    def __init__(self, settings: FetchSettings, storage_options: Mapping[str, Any]) -> None:
        self._settings = settings
        self._options = storage_options

    def __call__(self, ref: Ref) -> Fetched:
        """Read `ref`. Raises FetchError (a MediaError) with a fetch.* code."""
        limit = self._settings.max_bytes
        if ref.planned is not None and ref.planned > limit:
            raise _too_large(ref, "max_bytes", limit, 0)
        if ref.length == 0:  # no range means "nothing", so there is nothing to ask for
            return Fetched(b"", 0)
        most = limit if ref.planned is None else ref.planned
        data, attempts = self._tried(ref, lambda: self._read(ref, most), "max_bytes", limit)
        if ref.planned is not None and len(data) != ref.planned:
            raise changed(ref, str(len(data)), attempts)
        return Fetched(data, attempts)

    def state(self, ref: Ref) -> State:
        """What the store says of the whole object, without reading it. Raises FetchError."""
        return self._tried(ref, lambda: self._ask(ref), "max_bytes", 0)[0]

    def stream(self, ref: Ref, file: IO[bytes], most: int) -> int:
        """The whole of an http(s) object into `file`, in one request; returns the attempts.

        For a server that knows no ranges: timeout_s is that of each PART_BYTES. More than `most`
        bytes are fetch.too_large. Raises FetchError.
        """

        def once() -> None:
            store, path = self._store(ref)
            file.seek(0)
            fsspec.asyn.sync(
                store.loop, _stream_http, store, path, file, most, self._settings.timeout_s
            )

        return self._tried(ref, once, "max_file_bytes", most)[1]

    def _tried(self, ref: Ref, once: Callable[[], T], setting: str, limit: int) -> tuple[T, int]:
        """What `once` returns, tried again where that may help, and the attempts."""
        retrying = Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            # AWS's "full jitter": after n failures a random wait up to 0.5 * 2^n s, at most 30 s
            wait=wait_random_exponential(multiplier=0.5, max=30),
            retry=retry_if_exception(lambda error: classify(error)[1]),
            reraise=True,
        )
        try:
            return retrying(once), _attempts(retrying)
        except LongerError:
            if ref.planned is None:
                raise _too_large(ref, setting, limit, _attempts(retrying)) from None
            raise changed(ref, "more", _attempts(retrying)) from None
        except StoreError as error:
            raise FetchError("fetch.unavailable", str(error), 0) from error
        except faults_of(ref.uri) as error:
            message = f"{redact(ref.uri)}: {reason(error)}"
            raise FetchError(classify(error)[0], message, _attempts(retrying)) from error

    def _store(self, ref: Ref) -> tuple[fsspec.AbstractFileSystem, str]:
        scheme, timeout = protocol(ref.uri), self._settings.timeout_s
        if scheme not in S3:
            return filesystem(ref.uri, self._options)
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
        return store, path

    def _read(self, ref: Ref, most: int) -> bytes:
        """One attempt: reads at most so many bytes, raises the store's own errors."""
        scheme = protocol(ref.uri)
        if scheme in LOCAL:
            return _read_local(local_path(ref.uri), ref, most)
        store, path = self._store(ref)
        if scheme in S3:
            read: Callable[..., Awaitable[bytes]] = _read_s3
        elif scheme in HTTP:
            read = _read_http
        elif store.async_impl:
            read = _read_async
        else:
            return _read_file(store, path, ref, most)
        timeout = self._settings.timeout_s
        return bytes(fsspec.asyn.sync(store.loop, read, store, path, ref, most, timeout=timeout))

    def _ask(self, ref: Ref) -> State:
        store, path = self._store(ref)
        timeout = self._settings.timeout_s
        if protocol(ref.uri) in HTTP:
            state: State = fsspec.asyn.sync(store.loop, _ask_http, store, path, timeout=timeout)
            return state
        if store.async_impl:
            info = fsspec.asyn.sync(store.loop, store._info, path, timeout=timeout)
        else:
            info = store.info(path)
        marks = tuple(str(info[name]) for name in MARKS if info.get(name) is not None)
        return State(info.get("size"), True, marks)


def _attempts(retrying: Retrying) -> int:
    return int(retrying.statistics["attempt_number"])


def _too_large(ref: Ref, setting: str, limit: int, attempts: int) -> FetchError:
    size = f"more than {limit}" if ref.planned is None else str(ref.planned)
    message = f"{redact(ref.uri)}: {size} bytes, fetch.{setting} is {limit}"
    return FetchError("fetch.too_large", message, attempts)


def changed(ref: Ref, found: str, attempts: int) -> FetchError:
    """Other bytes than were planned; `found`: how many."""
    message = f"{redact(ref.uri)}: {ref.planned} bytes were listed, {found} are there"
    return FetchError("fetch.changed", message, attempts)


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
    ranged = {} if ref.offset is None else {"Range": _range(ref)}
    async with _http(store, path, ranged) as response:
        response.raise_for_status()
        if ranged and response.status != 206:
            raise OSError(errno.ENOTSUP, "the server knows no ranges")
        return await _read_body(response.content.read, response.content_length, most)


async def _stream_http(
    store: fsspec.AbstractFileSystem, path: str, file: IO[bytes], most: int, timeout_s: float
) -> None:
    now = asyncio.get_running_loop().time
    # aiohttp's own limit is five minutes for all
    whole = aiohttp.ClientTimeout(total=None)
    async with asyncio.timeout(timeout_s) as limit, _http(store, path, {}, whole) as response:
        response.raise_for_status()
        while data := await _filled(response.content.read, PART_BYTES):
            if file.tell() + len(data) > most:
                raise LongerError
            # other threads' requests run on this event loop, and a disk may be slow
            try:
                await asyncio.to_thread(file.write, data)
            except OSError as error:
                raise DiskError(os.strerror(error.errno or 0)) from error
            limit.reschedule(now() + timeout_s)


async def _ask_http(store: fsspec.AbstractFileSystem, path: str) -> State:
    """By a GET of the first byte: signed URLs allow no HEAD, whose sizes are often wrong as well."""
    async with _http(store, path, {"Range": "bytes=0-0"}) as response:
        if response.status == 416:  # there is no first byte
            return State(None, False, ())
        response.raise_for_status()
        headers = response.headers
        marks = tuple(headers[name] for name in ("ETag", "Last-Modified") if headers.get(name))
        if headers.get("Content-Encoding", "identity") != "identity":
            return State(None, False, marks)
        if response.status != 206:
            return State(response.content_length or None, False, marks)
        size = headers.get("Content-Range", "").rpartition("/")[2]
        return State(int(size) if size.isdecimal() else None, size.isdecimal(), marks)


@asynccontextmanager
async def _http(
    store: fsspec.AbstractFileSystem,
    path: str,
    asked: Mapping[str, str],
    timeout: aiohttp.ClientTimeout | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    try:
        url = store.encode_url(path)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "no valid URL") from error
    session = await store.set_session()
    options = dict(store.kwargs)
    if timeout is not None:
        options["timeout"] = timeout
    # A compressed answer would make lengths and ranges mean something else.
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    if url.user is not None:  # what the row says comes first; aiohttp refuses both
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
    async with session.get(url, headers={**headers, **asked}, **options) as response:
        yield response


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
    return _within(await _filled(read, most + 1), most)


async def _filled(read: Callable[[int], Awaitable[bytes]], most: int) -> bytes:
    """So many bytes, or all that are left."""
    data = bytearray()
    while len(data) < most and (chunk := await read(min(CHUNK_BYTES, most - len(data)))):
        data += chunk
    return bytes(data)


def _within(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise LongerError
    return data


def _range(ref: Ref) -> str:
    if ref.offset is None or ref.length is None:
        raise ValueError("a range needs offset and length")
    return f"bytes={ref.offset}-{ref.offset + ref.length - 1}"
