"""The media stage for what has to seek: a batch of PLAN rows in, the same rows as PREPARED out.

Every row's file is brought onto this node (a bounded cache, local_files.py), and its span is prepared
by what its track needs (media_audio.py, media_video.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pyarrow as pa

from operators.errors import MediaError
from operators.fetch import FetchError, Ref
from operators.local_files import LocalFile
from operators.prepared import Row, planned, prepared_table
from operators.tracks import Kind, kind

# Fills a row from a file's path and the row of the plan; raises MediaError.
Prepare = Callable[[Row, str, dict[str, Any]], None]

# One file comes in while another is decoded.
AT_ONCE = 2
# One file at a time is decoded in a process, whatever is being fetched: it has one CPU.
_busy = threading.Lock()


class FileMedia:
    """Callable on a batch; holds settings only, so it pickles.

    `files` gives a node-local file for a reference and a version (local_files.LocalFiles).
    """

    def __init__(
        self,
        files: Callable[[Ref, str | None], AbstractContextManager[LocalFile]],
        prepare: Mapping[Kind, Prepare],
    ) -> None:
        self._files = files
        self._prepare = prepare

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Table of PLAN -> table of PREPARED, same rows in the same order."""
        plan = planned(batch)
        rows = list(_threads().map(self._run, plan.to_pylist()))
        return prepared_table(plan, rows)

    def _run(self, asked: dict[str, Any]) -> Row:
        row = Row()
        started = time.monotonic()
        try:
            with self._files(Ref.of(asked), asked["version"]) as file:
                row.attempts = file.attempts
                row.fetch_s = time.monotonic() - started
                with _busy:
                    self._prepare[kind(asked["track"])](row, file.path, asked)
        except FetchError as error:
            row.attempts, row.error = error.attempts, error
        except MediaError as error:
            row.error = error
        if row.fetch_s is None:
            row.fetch_s = time.monotonic() - started
        return row


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="files")
