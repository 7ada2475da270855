"""Rows of the media stage to one PREPARED table, whatever the modality.

A failed row keeps what was known and has null lists; a row without windows has empty ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from operators.errors import MediaError
from operators.schema import PLAN, PREPARED


@dataclass
class Window:
    """What one request sees. Times in seconds of the asset's time line, None for an image."""

    tokens: list[int]
    media: memoryview | bytes
    columns: int
    rows: int
    media_hash: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class Row:
    """One row's new columns, as far as it came."""

    width_px: int | None = None
    height_px: int | None = None
    duration_s: float | None = None
    attempts: int | None = None
    fetch_s: float | None = None
    decode_s: float | None = None
    prepare_s: float | None = None
    windows: list[Window] = field(default_factory=list)
    error: MediaError | None = None
    # what is missing of a row that has not failed
    gap: MediaError | None = None


def planned(batch: pa.Table) -> pa.Table:
    """A batch's columns of PLAN. A block without any value in a column may come with type null."""
    return batch.select(PLAN.names).cast(PLAN)


def prepared_table(plan: pa.Table, rows: Sequence[Row]) -> pa.Table:
    """The table of PREPARED. A gap has stage and message, and no code: the row is asked."""
    errors = [row.error or row.gap for row in rows]
    new = {
        "width_px": [row.width_px for row in rows],
        "height_px": [row.height_px for row in rows],
        "duration_s": [row.duration_s for row in rows],
        "error_code": [row.error and row.error.code for row in rows],
        "error_stage": [error and error.stage for error in errors],
        "error_message": [error and error.message for error in errors],
        "attempts": [row.attempts for row in rows],
        "window_start_s": [_times(row, "start_s") for row in rows],
        "window_end_s": [_times(row, "end_s") for row in rows],
        "fetch_s": [row.fetch_s for row in rows],
        "decode_s": [row.decode_s for row in rows],
        "prepare_s": [row.prepare_s for row in rows],
    }
    columns = {name: pa.array(values, PREPARED.field(name).type) for name, values in new.items()}
    windows = [window for row in rows if row.error is None for window in row.windows]
    payload = {
        "window_tokens": pa.array([window.tokens for window in windows], pa.list_(pa.int32())),
        "window_media": _binary([window.media for window in windows]),
        "window_columns": pa.array([window.columns for window in windows], pa.int32()),
        "window_rows": pa.array([window.rows for window in windows], pa.int32()),
        "window_media_hash": pa.array([window.media_hash for window in windows], pa.string()),
    }
    counts = [0 if row.error else len(row.windows) for row in rows]
    offsets = pa.array([0, *accumulate(counts)], pa.int32())
    nulls = pa.array([row.error is not None for row in rows], pa.bool_())
    for name, values in payload.items():
        columns[name] = pa.ListArray.from_arrays(
            offsets, values, type=PREPARED.field(name).type, mask=nulls
        )
    return pa.Table.from_arrays([*plan.columns, *columns.values()], schema=PREPARED)


def check_division(asked: Mapping[str, Any], spans: int) -> None:
    """Raise MediaError fetch.changed where the plan divided a track into other spans than `spans`.

    A plan that could not read the file has a span without a start.
    """
    if asked["span_start_s"] is None or asked["track_count"] != spans:
        raise MediaError(
            "fetch.changed",
            f"the plan has {asked['track_count']} spans of this track, now the file gives {spans}",
        )


def _times(row: Row, name: str) -> list[float] | None:
    """Null for a failed row, and for windows without a time."""
    times = [getattr(window, name) for window in row.windows]
    return None if row.error or None in times else times


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
