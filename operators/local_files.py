"""A file on this node for a reference: ffmpeg seeks, so it needs one.

Local files are used in place. Anything else is read once a node, part by part, into a folder of
bounded size that all workers of the node share:

    <key>        the whole file, renamed into place when complete; its mtime is the last use
    <key>.lock   held alone while it is read or removed, shared while it is used

Nothing needed for a resume is here: a lost folder costs a second read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from operators.errors import MediaError
from operators.fetch import Fetched, FetchError, Ref
from operators.stores import (
    LOCAL,
    StoreError,
    classify,
    faults_of,
    filesystem,
    local_path,
    protocol,
    reason,
    redact,
)

PART_BYTES = 16 << 20
# What tells one state of an object from the next, under the names that stores give it.
STATE = ("ETag", "etag", "LastModified", "mtime", "updated", "size")


@dataclass(frozen=True)
class LocalFile:
    """Where it is, and what that took."""

    path: str
    attempts: int
    seconds: float


class LocalFiles:
    """`with files(ref, version) as file:` the file stays while the block runs. Pickles.

    fetch reads ranges (operators.fetch.Fetch). max_file_bytes: a larger object is fetch.too_large.
    max_bytes: of the folder; the least recently used files go first, those in use stay.
    """

    def __init__(
        self,
        fetch: Callable[[Ref], Fetched],
        storage_options: Mapping[str, Any],
        folder: str,
        *,
        max_file_bytes: int = 16 << 30,
        max_bytes: int = 64 << 30,
    ) -> None:
        self._fetch = fetch
        self._options = storage_options
        self._folder = Path(folder)
        self._max_file_bytes = max_file_bytes
        self._max_bytes = max_bytes

    @contextmanager
    def __call__(self, ref: Ref, version: str | None) -> Iterator[LocalFile]:
        """Raises MediaError fetch.* and decode.empty."""
        started = time.monotonic()
        if protocol(ref.uri) in LOCAL and ref.offset is None:
            yield LocalFile(self._in_place(ref), 1, time.monotonic() - started)
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{ref.uri}\n{version or ''}\n{ref.offset}\n{ref.length}\n{ref.size_bytes}"
        path = self._folder / blake3(name.encode()).hexdigest(length=16)
        attempts = 0
        while True:
            with _lock(path, fcntl.LOCK_SH):
                if path.exists():
                    os.utime(path)
                    yield LocalFile(str(path), attempts, time.monotonic() - started)
                    return
            with _lock(path, fcntl.LOCK_EX):
                if not path.exists():
                    attempts = self._read(ref, path)

    def _in_place(self, ref: Ref) -> str:
        path = local_path(ref.uri)
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:
            code = classify(error)[0] if isinstance(error, OSError) else "fetch.not_found"
            why = reason(error) if isinstance(error, OSError) else "no file name"
            raise FetchError(code, f"{redact(ref.uri)}: {why}", 1) from error
        if not stat.S_ISREG(found.st_mode):
            raise FetchError("fetch.not_found", f"{redact(ref.uri)}: not a file", 1)
        if ref.planned is not None and found.st_size != ref.planned:
            message = f"{ref.planned} bytes were listed, {found.st_size} are there"
            raise FetchError("fetch.changed", f"{redact(ref.uri)}: {message}", 1)
        if found.st_size == 0:
            raise MediaError("decode.empty", "the file has no bytes")
        if not os.access(path, os.R_OK):
            raise FetchError("fetch.forbidden", f"{redact(ref.uri)}: permission denied", 1)
        return path

    def _read(self, ref: Ref, path: Path) -> int:
        """Reads the object beside `path`, then renames. Returns the attempts of its worst part."""
        before = self._state(ref)
        size = ref.planned if ref.planned is not None else before.get("size")
        if size == 0:
            raise MediaError("decode.empty", "the file has no bytes")
        if size is not None and size > self._max_file_bytes:
            message = f"{redact(ref.uri)}: {size} bytes; {self._max_file_bytes} are allowed"
            raise FetchError("fetch.too_large", message, 0)
        self._make_room(size or 0)
        descriptor, partial = tempfile.mkstemp(dir=self._folder, prefix=f"{path.name}.part-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                attempts = self._parts(ref, size, file)
            if size is not None and self._state(ref) != before:
                message = f"{redact(ref.uri)}: it changed while it was read"
                raise FetchError("fetch.changed", message, attempts)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        return attempts

    def _parts(self, ref: Ref, size: int | None, file: IO[bytes]) -> int:
        if size is None or (ref.offset is None and size <= PART_BYTES):
            # of unknown size: in one go, and fetch.max_bytes is its limit
            fetched = self._fetch(ref)
            if not fetched.data:
                raise MediaError("decode.empty", "the file has no bytes")
            file.write(fetched.data)
            return fetched.attempts
        attempts, first = 1, ref.offset or 0
        for start in range(0, size, PART_BYTES):
            length = min(PART_BYTES, size - start)
            part = replace(ref, offset=first + start, length=length)
            fetched = self._fetch(part)
            attempts = max(attempts, fetched.attempts)
            file.write(fetched.data)
        return attempts

    def _state(self, ref: Ref) -> dict[str, Any]:
        """What the store says of the object, without reading it; empty where one part is enough."""
        if ref.planned is not None and ref.planned <= PART_BYTES:
            return {}
        try:
            store, path = filesystem(ref.uri, self._options)
            info = store.info(path)
        except StoreError as error:
            raise FetchError("fetch.unavailable", str(error), 0) from error
        except faults_of(ref.uri) as error:
            message = f"{redact(ref.uri)}: {reason(error)}"
            raise FetchError(classify(error)[0], message, 1) from error
        return {name: info[name] for name in STATE if info.get(name) is not None}

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used until `wanted` bytes fit, or only files in use are left."""
        held = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                if ".part-" in entry.name and time.time() - found.st_mtime > 24 * 3600:
                    os.unlink(entry.path)  # its reader was killed
                elif "." not in entry.name:
                    held.append((found.st_mtime, found.st_size, Path(entry.path)))
        used = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if used + wanted <= self._max_bytes:
                return
            with contextlib.suppress(BlockingIOError), _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                path.unlink(missing_ok=True)
                used -= size


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    """flock, not fcntl's: that one is a process's, and here threads meet as well.

    Lock files stay: removing one would let two workers hold different files of one name.
    """
    with open(f"{path}.lock", "ab") as file:
        fcntl.flock(file, how)
        yield
