"""A file on this node for a reference: ffmpeg seeks, so it needs one.

Local files are used in place. Anything else is read once a node, part by part, into a folder of
bounded size that all workers of the node share:

    <key>        the whole file; its mtime is the last use; flock: shared while it is used
    <key>.part   while it is read, renamed when complete; flock: held alone; of full size from the start
    bytes        at least the sum of all sizes, so that the folder is not looked through for each file
    turn         held by the reader who waits for room, so that a large file is not overtaken for ever

Who removes a file holds its lock alone, so what is locked is in use or is being read, and what waits
for a lock looks afterwards whether the file is still there. Nothing needed for a resume is here: a
lost folder costs a second read.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from blake3 import blake3

from operators.errors import MediaError
from operators.fetch import PART_BYTES, Fetch, FetchError, Ref, State, changed
from operators.stores import HTTP, LOCAL, classify, local_path, protocol, reason, redact

BYTES, TURN = "bytes", "turn"
# A full folder is emptied down to this at once: one look through it for many files, not for each.
KEPT = 0.9
WAIT_S = 0.1


@dataclass(frozen=True)
class LocalFile:
    """Where it is, and the attempts that took."""

    path: str
    attempts: int


class LocalFiles:
    """`with files(ref, version) as file:` the file stays while the block runs. Pickles.

    max_file_bytes: a larger object is fetch.too_large.
    max_bytes: of the folder, with what is being read; the least recently used files go first, those
    in use stay, and where that leaves no room a reader waits. A file larger than what is left is read
    when no other is in use; one whose size no server tells counts once it is there.
    """

    def __init__(
        self,
        fetch: Fetch,
        folder: str,
        *,
        max_file_bytes: int,
        max_bytes: int,
    ) -> None:
        self._fetch = fetch
        self._folder = Path(folder)
        self._max_file_bytes = max_file_bytes
        self._max_bytes = max_bytes

    @contextmanager
    def __call__(self, ref: Ref, version: str | None) -> Iterator[LocalFile]:
        """Raises MediaError fetch.* and decode.empty."""
        if protocol(ref.uri) in LOCAL and ref.offset is None:
            yield LocalFile(self._in_place(ref), 1)
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Without a version, yesterday's file would pass for today's.
        state = None if version else self._fetch.state(ref)
        name = f"{ref.uri}\n{version or state}\n{ref.offset}\n{ref.length}\n{ref.size_bytes}"
        path = self._folder / blake3(name.encode()).hexdigest(length=16)
        attempts = 0
        while True:
            with _locked(path, fcntl.LOCK_SH) as file:
                if file is not None:
                    os.utime(file)
                    yield LocalFile(str(path), attempts)
                    return
            attempts = self._read(ref, path, state)

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
            raise changed(ref, str(found.st_size), 1)
        if found.st_size == 0:
            raise MediaError("decode.empty", "the file has no bytes")
        if not os.access(path, os.R_OK):
            raise FetchError("fetch.forbidden", f"{redact(ref.uri)}: permission denied", 1)
        return path

    def _read(self, ref: Ref, path: Path, state: State | None) -> int:
        """Read it, unless somebody else just did. Returns the attempts of its worst part."""
        partial = Path(f"{path}.part")
        with _locked(partial, fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT) as descriptor:
            if descriptor is None:
                return 0
            try:
                attempts = 0
                if path.exists():
                    os.unlink(partial)
                else:
                    with open(descriptor, "r+b", closefd=False) as file:
                        attempts = self._fill(ref, state, partial, file)
                    # with the book: who looks through the folder meanwhile could miss both names
                    with _opened(self._folder / BYTES):
                        os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return attempts

    def _fill(self, ref: Ref, state: State | None, partial: Path, file: IO[bytes]) -> int:
        size = ref.planned
        if state is None and (size is None or size > PART_BYTES):
            state = self._fetch.state(ref)
        if state is not None and size is None:
            size = state.size
        if size == 0:
            raise MediaError("decode.empty", "the file has no bytes")
        if size is not None and size > self._max_file_bytes:
            message = f"{redact(ref.uri)}: {size} bytes; {self._max_file_bytes} are allowed"
            raise FetchError("fetch.too_large", message, 0)
        if size is not None:
            self._reserve(partial, file, size)
        one = size is None or size <= PART_BYTES or (state is not None and not state.ranges)
        if size is None or (one and ref.offset is None):
            attempts = self._whole(ref, file)
        else:
            attempts = self._parts(ref, size, file)
        found = file.tell()
        file.truncate()
        if found == 0:
            raise MediaError("decode.empty", "the file has no bytes")
        if size is None:
            self._count(found)
        elif found != size or (not one and self._fetch.state(ref) != state):
            message = f"{redact(ref.uri)}: it changed while it was read"
            raise FetchError("fetch.changed", message, attempts)
        return attempts

    def _whole(self, ref: Ref, file: IO[bytes]) -> int:
        if protocol(ref.uri) in HTTP:
            most = self._max_file_bytes if ref.planned is None else ref.planned
            return self._fetch.stream(ref, file, most)
        fetched = self._fetch(ref)
        file.write(fetched.data)
        return fetched.attempts

    def _parts(self, ref: Ref, size: int, file: IO[bytes]) -> int:
        attempts, first = 1, ref.offset or 0
        for start in range(0, size, PART_BYTES):
            length = min(PART_BYTES, size - start)
            fetched = self._fetch(replace(ref, offset=first + start, length=length))
            attempts = max(attempts, fetched.attempts)
            file.write(fetched.data)
        return attempts

    def _reserve(self, partial: Path, file: IO[bytes], size: int) -> None:
        """Wait until `size` bytes fit, or nothing else is left, and make `file` as large."""
        with _opened(self._folder / TURN):
            while not self._fits(partial, file, size):
                time.sleep(WAIT_S)

    def _fits(self, partial: Path, file: IO[bytes], size: int) -> bool:
        with _opened(self._folder / BYTES) as book:
            used = _counted(book)
            if used is None or used + size > self._max_bytes:
                used, in_use = self._make_room(partial, size)
                if in_use and used + size > self._max_bytes:
                    return False
            # before the book is given back: who looks through the folder next must see it
            file.truncate(size)
            _write(book, used + size)
            return True

    def _count(self, size: int) -> None:
        with _opened(self._folder / BYTES) as book:
            used = _counted(book)
            if used is not None:
                _write(book, used + size)

    def _make_room(self, partial: Path, wanted: int) -> tuple[int, bool]:
        """Remove the least recently used; what is used then beside `partial`, and is any in use?"""
        held, in_use = [], False
        for entry in os.scandir(self._folder):
            if entry.name not in (BYTES, TURN, partial.name):
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    held.append((found.st_mtime, found.st_size, Path(entry.path)))
        used = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            # a part that nobody holds is a killed reader's
            if path.suffix != ".part" and used + wanted <= KEPT * self._max_bytes:
                continue
            try:
                with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
                    if file is not None:
                        path.unlink()
                        used -= size
            except BlockingIOError:
                in_use |= size > 0  # one without bytes waits for room itself
        return used, in_use


@contextmanager
def _locked(path: Path, how: int, flags: int = os.O_RDONLY) -> Iterator[int | None]:
    """A descriptor of the file with a lock on it; None where it is not there, or no longer.

    flock, not fcntl's: that one is a process's, and here threads meet as well.
    """
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(descriptor, how)
        try:
            there = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            there = False
        yield descriptor if there else None
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file that is never removed, held alone."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _counted(book: IO[bytes]) -> int | None:
    text = book.read()
    return int(text) if text.isdigit() else None


def _write(book: IO[bytes], used: int) -> None:
    book.seek(0)
    book.write(b"%020d" % used)
