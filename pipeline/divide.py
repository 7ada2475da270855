"""Recordings and videos to spans: every unfinished one is probed on the cluster.

The spans come back to the plan. Nothing is decoded; of a remote file as much is read as its header needs,
and where that is not enough all of it, into its node's cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import ray.data

from operators.divide import Divide, speech_tracks, video_tracks
from operators.fetch import PART_BYTES, Fetch
from operators.local_files import LocalFiles
from operators.ranged import Ranges
from operators.schema import DIVIDED, FOUND
from operators.tracks import FRAMES, sound_tracks
from pipeline.cluster import Connect
from pipeline.config import Job

# A number, and of what: pipeline/progress.py
SayCount = Callable[[int, str], None]

ROWS_A_TASK = 32
# A probe waits for the store and for ffprobe; it computes little.
PROBE_CPUS = 0.5


def local_files(job: Job) -> LocalFiles:
    """The cache that all workers of a node share."""
    return LocalFiles(
        _fetch(job),
        str(Path(tempfile.gettempdir()) / f"polyscribe-files-{os.getuid()}"),
        max_file_bytes=job.fetch.max_file_bytes,
        max_bytes=job.fetch.max_cache_bytes,
    )


def divider(job: Job) -> Divide:
    """How this job's files are divided."""
    ranges = Ranges(_fetch(job), max_file_bytes=job.fetch.max_file_bytes)
    read = ranges, local_files(job)
    if job.modality == "video":
        return Divide(*read, partial(video_tracks, video=job.video, audio=job.audio), FRAMES)
    unread = sound_tracks(1, job.audio)[0]
    return Divide(*read, partial(speech_tracks, audio=job.audio), unread)


def _fetch(job: Job) -> Fetch:
    # max_bytes is an image's, and here each request reads a part of a file
    parts = {"max_bytes": max(job.fetch.max_bytes, PART_BYTES)}
    return Fetch(job.fetch.model_copy(update=parts), job.input.storage_options)


def divide_files(
    job: Job, db: duckdb.DuckDBPyConnection, connect: Connect, progress: SayCount
) -> None:
    """Fill `divided` from `unfinished`. Connects to Ray where there is anything to do."""
    db.register("nothing", DIVIDED.empty_table())
    db.execute("CREATE TABLE divided AS SELECT * FROM nothing")
    columns = ", ".join(FOUND.names)
    reader = db.sql(f"SELECT {columns} FROM unfinished").to_arrow_reader(ROWS_A_TASK)
    blocks = [pa.Table.from_batches([batch]) for batch in reader]
    if not blocks:
        return
    connect()
    probed = ray.data.from_arrow(blocks).map_batches(
        divider(job),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=PROBE_CPUS,
    )
    files, read = sum(block.num_rows for block in blocks), 0
    for table in probed.iter_batches(batch_size=None, batch_format="pyarrow"):
        db.register("batch", table)
        db.execute("INSERT INTO divided SELECT * FROM batch")
        read += len(table["asset_id"].unique())
        progress(read, f"of {files:,} files measured")
