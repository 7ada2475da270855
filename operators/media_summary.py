"""The media stage for summaries: no media, but the texts that their assets' other spans gave.

A batch of PLAN rows in, whose `variables` hold these texts (pipeline/summaries.py), the same rows as
PREPARED out. Where there was nothing to see and nothing was said, the model is not asked.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pyarrow as pa

from operators.errors import MediaError
from operators.prepare_image import media_hash
from operators.prepared import Row, Window, planned, prepared_table
from operators.prompt_summary import Line, SummaryPrompt


class Summaries:
    """Callable on a batch; holds a prompt only, so it pickles."""

    def __init__(self, prompt: SummaryPrompt) -> None:
        self._prompt = prompt

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Table of PLAN -> table of PREPARED, same rows in the same order."""
        plan = planned(batch)
        return prepared_table(plan, [self._row(asked) for asked in plan.to_pylist()])

    def _row(self, asked: dict[str, Any]) -> Row:
        started = time.perf_counter()
        row = Row()
        told = json.loads(asked["variables"])
        lines = [Line(one["start_s"], one["text"]) for one in told["captions"] or ()]
        lines += [Line(one["start_s"], one["text"], True) for one in told["transcript"] or ()]
        try:
            if lines:
                ids = self._prompt.window(lines)
                row.windows = [Window(ids, b"", 0, 0, media_hash(b"", 0, 0))]
            elif told["failed"] is not None:
                row.error = MediaError(told["failed"], "nothing to tell of: every span failed")
        except MediaError as error:
            row.error = error
        row.prepare_s = time.perf_counter() - started
        return row
