"""Tar shards: their members as assets, from the headers alone.

Damage never stops the run and nothing vanishes. A member that the shard's end cuts off is a row of
the bytes that are there (the decoder calls it corrupt). Where the headers end or make no sense, one
row stands for the rest of the shard: its uri is the shard's own, its bytes are the block that is no
header (decode.unsupported; decode.empty for an empty shard).
"""

from __future__ import annotations

import queue
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from operators.stores import StoreError, redact
from pipeline.source_list import is_rows_own, opened
from pipeline.source_rows import Asset, Skipped, SourceError, listing_faults, refusal

BLOCK_BYTES = tarfile.BLOCKSIZE
# Beyond the end mark tar pads with zeros, by default up to 10 KiB; so far we look for more.
PADDING_BYTES = 64 << 10
# The most that tarfile may read at once: long names of a few KiB, attributes of 64 KiB each.
HEADER_BYTES = 1 << 20
SHARDS_AT_ONCE = 8
# What tarfile raises where headers make no sense: numbers that are none or do not fit, lists of
# holes that end early, names of names of names.
DAMAGED = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError)
CHUNK_MEMBERS = 256
CHUNKS_AHEAD = 4


def tar_assets(
    shards: Iterable[Asset],
    wanted: Callable[[str], bool],
    storage_options: Mapping[str, Any],
    skipped: Skipped,
) -> Iterator[Asset]:
    """The members of every shard, shard after shard, while the next ones are indexed ahead.

    `wanted` is asked for each member's name, from several threads. In memory: at most
    SHARDS_AT_ONCE * CHUNKS_AHEAD * CHUNK_MEMBERS members.
    """
    stop = threading.Event()

    def index(shard: Asset, chunks: queue.Queue[list[Asset]]) -> None:
        chunk: list[Asset] = []
        try:
            for asset in members(shard, wanted, storage_options, skipped):
                chunk.append(asset)
                if len(chunk) == CHUNK_MEMBERS:
                    _put(chunks, chunk, stop)
                    chunk = []
                if stop.is_set():
                    return
        finally:
            if chunk:
                _put(chunks, chunk, stop)
            _put(chunks, [], stop)

    waiting = iter(shards)
    ahead: deque[tuple[Future[None], queue.Queue[list[Asset]]]] = deque()
    with ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="tar") as pool:
        try:
            while True:
                while len(ahead) < SHARDS_AT_ONCE and (shard := next(waiting, None)) is not None:
                    chunks: queue.Queue[list[Asset]] = queue.Queue(CHUNKS_AHEAD)
                    ahead.append((pool.submit(index, shard, chunks), chunks))
                if not ahead:
                    return
                done, chunks = ahead.popleft()
                while chunk := chunks.get():
                    yield from chunk
                done.result()
        finally:
            stop.set()  # a reader that stops early must not leave threads that wait for it


def members(
    shard: Asset,
    wanted: Callable[[str], bool],
    storage_options: Mapping[str, Any],
    skipped: Skipped,
) -> Iterator[Asset]:
    """Every wanted regular member in the shard's order; then a row for the rest, if damaged."""
    uri = shard.fetch_uri
    try:
        with opened(uri, storage_options) as file:
            yield from _headers(_HeaderFile(file, uri), shard, wanted, skipped)
    except listing_faults(uri) as error:
        if isinstance(error, StoreError) or not is_rows_own(error):
            raise refusal(uri, error) from error
        yield _rest(shard, 0, BLOCK_BYTES)  # the fetch meets the same fault and gives the code


class _HeaderFile:
    """A shard as tarfile reads it. A long name's header may lie about its length, and tarfile reads
    as many bytes at once as it says: beyond HEADER_BYTES it counts as damaged."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file = file
        self._uri = uri
        self.tell, self.seek = file.tell, file.seek

    def size(self) -> int:
        with self._needs_ranges():
            return self.seek(0, 2)

    def read(self, count: int) -> bytes:
        if count > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES} bytes")
        with self._needs_ranges():
            return self._file.read(count)

    @contextmanager
    def _needs_ranges(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # fsspec's way to say it
            message = f"{redact(self._uri)}: the server knows no ranges; copy the shard to a store"
            raise SourceError(message) from error


def _headers(
    file: _HeaderFile, shard: Asset, wanted: Callable[[str], bool], skipped: Skipped
) -> Iterator[Asset]:
    end, size = 0, file.size()
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                # tarfile keeps every header that it has seen
                archive.members.clear()
                # A negative size leads back to headers that were read before.
                if member.size < 0 or archive.offset <= end:
                    raise tarfile.ReadError("negative size")
                end = archive.offset
                if not member.isreg() or member.issparse():
                    if not member.isdir():
                        skipped.add("tar member is a link, a device or sparse")
                elif wanted(name := _name(member)):
                    there = min(member.size, max(0, size - member.offset_data))
                    yield Asset(
                        fetch_uri=shard.fetch_uri,
                        version=f"{shard.version}-{member.offset_data}-{member.size}",
                        size_bytes=there,
                        uri=f"tar://{name}::{shard.fetch_uri}",
                        fetch_offset=member.offset_data,
                        fetch_length=there,
                    )
                    if there < member.size:
                        return
                if end > size:
                    raise tarfile.ReadError("cut off")
            end = archive.offset
    except DAMAGED:
        start = min(end, size)
        yield _rest(shard, start, min(BLOCK_BYTES, size - start))
        return
    # tarfile ends at a damaged header as quietly as at the two zero blocks of the real end.
    file.seek(end)
    block = file.read(BLOCK_BYTES)
    if not block:
        skipped.add("tar shard has no end mark (its members were taken)")
        return
    padding = block if any(block) else block + file.read(PADDING_BYTES)
    more = len(padding) - len(padding.lstrip(b"\0"))
    if more < len(padding):  # a bad header, or tars that were put together with cat
        start = more - more % BLOCK_BYTES
        yield _rest(shard, end + start, min(BLOCK_BYTES, len(padding) - start))


def _name(member: tarfile.TarInfo) -> str:
    """For people (the offset finds the bytes), so no UTF-8 is mended."""
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _rest(shard: Asset, offset: int, length: int) -> Asset:
    return replace(
        shard,
        uri=shard.fetch_uri,
        size_bytes=length,
        fetch_offset=offset,
        fetch_length=length,
    )


def _put(chunks: queue.Queue[list[Asset]], chunk: list[Asset], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            chunks.put(chunk, timeout=0.1)
        except queue.Full:
            continue
        return
