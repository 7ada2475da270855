"""The media stage, fetch to prepare: a batch of PLAN rows in, the same rows as PREPARED out.

Each row takes one thread from fetch to prompt. The threads wait for the store and for the one
contained child, so the next files come in while one is decoded; that child is the only busy part.
A row's MediaError becomes its error columns; everything else is a broken machine and propagates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from operators.contain import Contained
from operators.decode_image import probe_image
from operators.errors import MediaError
from operators.fetch import Fetched, FetchError, Ref
from operators.prepare_image import PRELOAD, media_hash, prepare_image
from operators.prompt import Prompt
from operators.schema import PLAN, PREPARED
from operators.settings import ImageSettings


@dataclass
class _Row:
    """One row's new columns, as far as it came."""

    width_px: int | None = None
    height_px: int | None = None
    attempts: int | None = None
    fetch_s: float | None = None
    decode_s: float | None = None
    prepare_s: float | None = None
    tokens: list[int] | None = None
    media: memoryview | bytes | None = None
    columns: int = 0
    rows: int = 0
    media_hash: str | None = None
    error: MediaError | None = None


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
        # a block without any value in a column may come with type null
        plan = batch.select(PLAN.names).cast(PLAN)
        asked = plan.select(
            ["fetch_uri", "fetch_offset", "fetch_length", "size_bytes", "variables"]
        ).to_pylist()
        contained = _contained(self._image.max_memory_bytes)
        run = partial(self._run, contained)
        rows = list(_threads(self._concurrency).map(run, asked))
        return _table(plan, rows)

    def _run(self, contained: Contained, asked: dict[str, Any]) -> _Row:
        row = _Row()
        try:
            self._prepare(row, contained, asked)
        except MediaError as error:
            row.error = error
        return row

    def _prepare(self, row: _Row, contained: Contained, asked: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            fetched = self._fetch(
                Ref(
                    asked["fetch_uri"],
                    asked["fetch_offset"],
                    asked["fetch_length"],
                    asked["size_bytes"],
                )
            )
            row.attempts = fetched.attempts
        except FetchError as error:
            row.attempts = error.attempts
            raise
        finally:
            row.fetch_s = time.monotonic() - started
        variables = json.loads(asked["variables"]) if asked["variables"] else None
        if self._render == "engine":
            self._hand_on(row, contained, fetched.data)
            return
        done = contained.submit(
            prepare_image, fetched.data, self._image, timeout_s=self._image.timeout_s
        ).result()
        row.width_px, row.height_px = done.width_px, done.height_px
        row.decode_s = done.decode_s
        started = time.perf_counter()
        row.tokens = self._prompt.window(len(done.media), variables)
        row.prepare_s = done.prepare_s + time.perf_counter() - started
        row.media, row.columns, row.rows = done.media.data, done.columns, done.rows
        row.media_hash = done.media_hash

    def _hand_on(self, row: _Row, contained: Contained, data: bytes) -> None:
        row.width_px, row.height_px = contained.submit(
            probe_image, data, self._image, timeout_s=self._image.timeout_s
        ).result()
        row.decode_s = row.prepare_s = 0.0
        row.tokens, row.media = [], data
        row.media_hash = media_hash(data, 0, 0)


@cache
def _contained(max_memory_bytes: int) -> Contained:
    return Contained(max_memory_bytes, PRELOAD)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="media")


def _table(plan: pa.Table, rows: Sequence[_Row]) -> pa.Table:
    failed = [row.error is not None for row in rows]
    good = [row for row in rows if row.error is None]
    errors = [row.error for row in rows]
    new = {
        "width_px": [row.width_px for row in rows],
        "height_px": [row.height_px for row in rows],
        "duration_s": [None] * len(rows),
        "error_code": [error and error.code for error in errors],
        "error_stage": [error and error.stage for error in errors],
        "error_message": [error and error.message for error in errors],
        "attempts": [row.attempts for row in rows],
        "window_start_s": [None] * len(rows),
        "window_end_s": [None] * len(rows),
        "fetch_s": [row.fetch_s for row in rows],
        "decode_s": [row.decode_s for row in rows],
        "prepare_s": [row.prepare_s for row in rows],
    }
    columns = {name: pa.array(values, PREPARED.field(name).type) for name, values in new.items()}
    payload = {
        "window_tokens": pa.array([row.tokens for row in good], pa.list_(pa.int32())),
        "window_media": _binary([row.media for row in good if row.media is not None]),
        "window_columns": pa.array([row.columns for row in good], pa.int32()),
        "window_rows": pa.array([row.rows for row in good], pa.int32()),
        "window_media_hash": pa.array([row.media_hash for row in good], pa.string()),
    }
    # one window a row, none in a failed one
    offsets = pa.array([0, *accumulate(int(not bad) for bad in failed)], pa.int32())
    nulls = pa.array(failed, pa.bool_())
    for name, values in payload.items():
        columns[name] = pa.ListArray.from_arrays(
            offsets, values, type=PREPARED.field(name).type, mask=nulls
        )
    return pa.Table.from_arrays([*plan.columns, *columns.values()], schema=PREPARED)


def _binary(values: Sequence[memoryview | bytes]) -> pa.LargeBinaryArray:
    """One copy into one buffer; pa.array would grow its buffer by doubling, and copy again."""
    views = [memoryview(value).cast("B") for value in values]
    ends = np.array([0, *accumulate(view.nbytes for view in views)], np.int64)
    buffer = pa.allocate_buffer(int(ends[-1]))
    target = memoryview(buffer).cast("B")
    for view, start, end in zip(views, ends[:-1], ends[1:], strict=True):
        target[start:end] = view
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(views), [None, pa.py_buffer(ends), buffer]
    )
