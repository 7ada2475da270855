"""The media stage, fetch to prepare: a batch of PLAN rows in, the same rows as PREPARED out.

Each row takes one thread from fetch to prompt. The threads wait for the store and for the one
contained child, so the next files come in while one is decoded; that child is the only busy part.
A row's MediaError becomes its error columns; everything else is a broken machine and propagates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Literal

import pyarrow as pa

from operators.contain import Contained
from operators.decode_image import probe_image
from operators.errors import MediaError
from operators.fetch import Fetched, FetchError, Ref
from operators.prepare_image import PRELOAD, media_hash, prepare_image
from operators.prepared import Row, Window, planned, prepared_table
from operators.prompt import Prompt
from operators.settings import ImageSettings


class Media:
    """Callable on a batch; holds settings only, so it pickles.

    Child and threads belong to the worker process, not to this object: Ray unpickles the object
    for each task. With render="engine" the payload is the file's own bytes, of which only the
    header has been read; window_tokens is then one empty list and the grid 0x0.
    """

    def __init__(
        self,
        fetch: Callable[[Ref], Fetched],
        image: ImageSettings,
        prompt: Prompt,
        *,
        render: Literal["prepared", "engine"] = "prepared",
        concurrency: int = 8,
    ) -> None:
        self._fetch = fetch
        self._image = image
        self._prompt = prompt
        self._render = render
        self._concurrency = concurrency

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Table of PLAN -> table of PREPARED, same rows in the same order."""
        plan = planned(batch)
        asked = plan.select(
            ["fetch_uri", "fetch_offset", "fetch_length", "size_bytes", "variables"]
        ).to_pylist()
        contained = _contained(self._image.max_memory_bytes)
        run = partial(self._run, contained)
        rows = list(_threads(self._concurrency).map(run, asked))
        return prepared_table(plan, rows)

    def _run(self, contained: Contained, asked: dict[str, Any]) -> Row:
        row = Row()
        try:
            self._prepare(row, contained, asked)
        except MediaError as error:
            row.error = error
        return row

    def _prepare(self, row: Row, contained: Contained, asked: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            fetched = self._fetch(Ref.of(asked))
            row.attempts = fetched.attempts
        except FetchError as error:
            row.attempts = error.attempts
            raise
        finally:
            row.fetch_s = time.monotonic() - started
        variables = json.loads(asked["variables"] or "null")
        if self._render == "engine":
            self._hand_on(row, contained, fetched.data)
            return
        done = contained.submit(
            prepare_image, fetched.data, self._image, timeout_s=self._image.timeout_s
        ).result()
        row.width_px, row.height_px = done.width_px, done.height_px
        row.decode_s = done.decode_s
        started = time.perf_counter()
        tokens = self._prompt.window(len(done.media), variables)
        row.prepare_s = done.prepare_s + time.perf_counter() - started
        row.windows = [Window(tokens, done.media.data, done.columns, done.rows, done.media_hash)]

    def _hand_on(self, row: Row, contained: Contained, data: bytes) -> None:
        row.width_px, row.height_px = contained.submit(
            probe_image, data, self._image, timeout_s=self._image.timeout_s
        ).result()
        row.decode_s = row.prepare_s = 0.0
        row.windows = [Window([], data, 0, 0, media_hash(data, 0, 0))]


@cache
def _contained(max_memory_bytes: int) -> Contained:
    return Contained(max_memory_bytes, PRELOAD)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="media")
