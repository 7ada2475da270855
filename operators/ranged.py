"""A remote file for ffprobe, by ranges: what its header needs is read, and not the file.

A film of 10 GB says in two megabytes how long it is. ffprobe seeks, so it gets a URL on this machine's
loopback, whose blocks are asked of the store when they are read.
"""

from __future__ import annotations

import io
import re
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

from operators.fetch import Fetch, Ref
from operators.stores import LOCAL, protocol

BLOCK_BYTES = 1 << 20
# Of a smaller file head and tail are much of it; read whole, it may still be there for the media stage.
LEAST_BYTES = 4 * BLOCK_BYTES
# Who wants more than this wants all of it: fragmented MP4 is looked through to its end.
MOST_BYTES = 16 * BLOCK_BYTES
# What is under way to a reader that seeks elsewhere is read for nothing.
SEND_BYTES = 1 << 16


class WholeFileError(Exception):
    """A header is not enough: the whole file must be read. Or its blocks cannot be had."""


class Ranged:
    """The blocks of a remote file, each asked for once. Thread-safe."""

    def __init__(self, fetch: Fetch, ref: Ref, size: int) -> None:
        self.size = size
        self.url = ""
        self._fetch = fetch
        self._ref = ref
        self._blocks: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._broken = False

    def open(self) -> BinaryIO:
        """For reading; raises WholeFileError."""
        return io.BufferedReader(_Reader(self))

    def block(self, number: int) -> bytes:
        """Bytes from number * BLOCK_BYTES on, to the end of the block. Raises WholeFileError."""
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = self._read(number * BLOCK_BYTES)
            return self._blocks[number]

    def check(self) -> None:
        """Raises WholeFileError where a reader did not get what it asked for."""
        if self._broken:
            raise WholeFileError

    def _read(self, start: int) -> bytes:
        try:
            if self._broken or len(self._blocks) * BLOCK_BYTES >= MOST_BYTES:
                raise WholeFileError
            length = min(BLOCK_BYTES, self.size - start)
            offset = (self._ref.offset or 0) + start
            return self._fetch(replace(self._ref, offset=offset, length=length)).data
        # none may pass for the file's end; the whole file meets it again
        except Exception as error:
            self._broken = True
            raise WholeFileError from error


class Ranges:
    """`with ranges(ref) as remote:` None where the file is local, small or too large, or has no ranges.

    Raises FetchError where the store is asked for the size, which nobody lists over HTTP, and does not
    say it. max_file_bytes: as LocalFiles', which refuses it once. Pickles.
    """

    def __init__(self, fetch: Fetch, *, max_file_bytes: int) -> None:
        self._fetch = fetch
        self._max_file_bytes = max_file_bytes

    @contextmanager
    def __call__(self, ref: Ref) -> Iterator[Ranged | None]:
        size = 0 if protocol(ref.uri) in LOCAL else self._size(ref)
        if not LEAST_BYTES <= size <= self._max_file_bytes:
            yield None
            return
        server, name = _server(), secrets.token_urlsafe()
        remote = Ranged(self._fetch, ref, size)
        remote.url = f"http://127.0.0.1:{server.server_port}/{name}"
        server.files[f"/{name}"] = remote
        try:
            yield remote
        finally:
            del server.files[f"/{name}"]

    def _size(self, ref: Ref) -> int:
        """0 where it is not known, or parts cannot be read."""
        if ref.planned is not None:
            return ref.planned
        state = self._fetch.state(ref)
        return state.size or 0 if state.ranges else 0


class _Reader(io.RawIOBase):
    def __init__(self, remote: Ranged) -> None:
        self._remote = remote
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._remote.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self._remote.size:
            return 0
        number, start = divmod(self._at, BLOCK_BYTES)
        data = self._remote.block(number)[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Ranged] = {}


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        super().setup()

    def do_GET(self) -> None:
        remote = self.server.files.get(self.path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if remote is None or asked is None:
            self.send_error(404)
            return
        start, size = int(asked[1]), remote.size
        if start >= size:
            self.send_error(416)
            return
        # it hangs up when it has what it wants
        with remote.open() as file, suppress(ConnectionError, WholeFileError):
            self.send_response(206)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(size - start))
            self.send_header("Connection", "close")
            self.end_headers()
            file.seek(start)
            while data := file.read(SEND_BYTES):
                self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@cache
def _server() -> _Server:
    """One a process, for as long as it lives."""
    server = _Server()
    threading.Thread(target=server.serve_forever, name="ranges", daemon=True).start()
    return server
