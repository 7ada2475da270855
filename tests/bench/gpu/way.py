"""The whole way on one machine: JPEG files, our operators in a pool of processes, the engine, text.

A pool takes Ray's place, because a machine without a network may not have Ray. Each worker runs what the
media stage runs for a file (operators/prepare_image.py: decode, resize, patchify, hash), one thread each.
Patches come back through shared memory, as they do through Ray's object store; tensors are made on
threads of the front process, as in the engine's actor.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from bench.gpu.serving import Server
from bench.gpu.stream import Pace, stream
from bench.gpu.tasks import Feed, engine_input, picture
from bench.gpu.telemetry import GpuMeter, children_cpu_s

from operators.patchify import PATCH_VALUES
from operators.prepare_image import prepare_image
from operators.requests import ImageRequest
from operators.settings import ImageSettings

_shared: SharedMemory | None = None


def write_jpegs(folder: Path, count: int, workers: int) -> list[str]:
    """1080p pictures of random content, quality 90. Those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number:05d}.jpg") for number in range(count)]
    missing = [(n, path) for n, path in enumerate(paths) if not os.path.exists(path)]
    if missing:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_write_jpeg, missing))
    return paths


def _write_jpeg(work: tuple[int, str]) -> None:
    from PIL import Image

    number, path = work
    Image.fromarray(picture(number)).save(path, quality=90)


def _attach(name: str) -> None:
    """A worker's start: the slots, and the work's modules, so that no measured file waits for them."""
    global _shared
    _shared = SharedMemory(name)
    import torch

    torch.set_num_threads(1)


def _prepare(path: str, slot: int, slot_bytes: int, budget: int) -> tuple[int, int, str]:
    """A file to patches in the slot. Returns (columns, rows, media hash)."""
    assert _shared is not None
    done = prepare_image(Path(path).read_bytes(), ImageSettings(max_soft_tokens=budget))
    start = slot * slot_bytes
    _shared.buf[start : start + done.media.nbytes] = done.media.data.cast("B")
    return done.columns, done.rows, done.media_hash


class Media:
    """The media stage as a pool: `request(n)` gives the n-th file's prepared request."""

    def __init__(self, paths: list[str], feed: Feed, workers: int) -> None:
        self._paths = paths
        self._feed = feed
        self._budget = feed.task.budget
        self._slot_bytes = self._budget * PATCH_VALUES
        slots = 3 * workers
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._room = asyncio.Semaphore(slots)
        self._memory = SharedMemory(create=True, size=slots * self._slot_bytes)
        before = set(psutil.Process().children(recursive=True))
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _attach, (self._memory.name,)
        )
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="front")
        # start all of them, with their imports
        warm = [
            self._pool.submit(_prepare, path, 0, self._slot_bytes, self._budget)
            for path in (paths * workers)[: 4 * workers]
        ]
        for each in warm:
            each.result()
        self.pids = [p.pid for p in set(psutil.Process().children(recursive=True)) - before]

    async def request(self, number: int, *, tensors: bool = True) -> Any:
        """The engine's input of a file; tensors=False ends with the patches (the media stage alone)."""
        loop = asyncio.get_running_loop()
        path = self._paths[number % len(self._paths)]
        async with self._room:
            slot = self._free.get_nowait()
            try:
                columns, rows, _ = await loop.run_in_executor(
                    self._pool, _prepare, path, slot, self._slot_bytes, self._budget
                )
                if not tensors:
                    return None
                return await loop.run_in_executor(
                    self._threads, self._tensors, number, slot, columns, rows
                )
            finally:
                self._free.put(slot)

    def _tensors(self, number: int, slot: int, columns: int, rows: int) -> Any:
        count = columns * rows
        patches = np.frombuffer(
            self._memory.buf, np.uint8, count * PATCH_VALUES, slot * self._slot_bytes
        ).reshape(count, PATCH_VALUES)
        ids, place = self._feed.prompt_of(count)
        return engine_input(ImageRequest(ids, place, patches, columns, rows, f"way-{number}"))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._threads.shutdown()
        self._memory.close()
        self._memory.unlink()


@contextmanager
def media_pool(paths: list[str], feed: Feed, workers: int) -> Iterator[Media]:
    media = Media(paths, feed, workers)
    try:
        yield media
    finally:
        media.close()


async def media_alone(media: Media, workers: int, seconds: float) -> dict[str, float]:
    """Images a second and CPU seconds an image of the pool, with nobody who takes them."""
    done = 0

    async def client(first: int) -> None:
        nonlocal done
        number = first
        while True:
            await media.request(number, tensors=False)
            number += 2 * workers
            done += 1

    clients = [asyncio.create_task(client(n)) for n in range(2 * workers)]
    before, started = children_cpu_s(media.pids), time.perf_counter()
    await asyncio.sleep(seconds)
    passed, items = time.perf_counter() - started, done
    used = children_cpu_s(media.pids) - before
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return {"items_s": items / passed, "cpu_s_item": used / max(1, items)}


async def whole_way(
    server: Server, feed: Feed, folder: Path, workers: int, files: int, pace: Pace, gpu: GpuMeter
) -> dict[str, Any]:
    """Figures of files to text at the feed's budget, and of the media stage alone."""
    paths = write_jpegs(folder, files, workers)
    with media_pool(paths, feed, workers) as media:
        alone = await media_alone(media, workers, pace.window_s)
        before, started = children_cpu_s(media.pids), time.perf_counter()
        figures = await stream(server, media.request, feed.task.output_tokens, pace, gpu)
        used, passed = children_cpu_s(media.pids) - before, time.perf_counter() - started
    busy = used / (passed * workers)
    return {
        **figures,
        "workers": workers,
        "media_alone_items_s": alone["items_s"],
        "media_cpu_s_item": alone["cpu_s_item"],
        "workers_busy": busy,
        # an engine that has room left waits for media
        "bottleneck": (
            "media"
            if (figures["running"] or 0) < 0.9 * min(pace.in_flight, server.setup.max_num_seqs)
            else "engine"
        ),
    }
