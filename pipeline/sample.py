"""The rows that the report shows: the first answers of this run's input, each with a thumbnail."""

from __future__ import annotations

import base64
from typing import Any

import duckdb
import pyarrow as pa

from operators.contain import Contained
from operators.errors import MediaError
from operators.fetch import Fetch, Ref
from operators.prepare_image import PRELOAD
from operators.thumbnail import thumbnail
from pipeline.assemble import FAILURES_FOLDER, RESULTS_FOLDER, Assembly, read_part
from pipeline.config import Job
from pipeline.progress import clock
from pipeline.store import Store

ANSWERS, FAILURES = 24, 50
# Of a recording's or a video's segments, so that a day of radio does not fill the page.
LINES = 12
TIMED = ["text", "segments", "transcript_segments"]


def answers(
    job: Job, db: duckdb.DuckDBPyConnection, folder: Store, assembly: Assembly
) -> list[dict[str, Any]]:
    """uri, status, error_code, `picture` (a data URI or None), `lines` (time, text) and how many `more`."""
    rows = _rows(
        db,
        folder,
        assembly,
        RESULTS_FOLDER,
        ["asset_id", "uri", "status", "error_code", *TIMED],
        """SELECT batch.*, fetch_uri, fetch_offset, fetch_length, size_bytes
        FROM batch JOIN found USING (asset_id) ORDER BY place LIMIT $limit""",
        ANSWERS,
    )
    fetch = Fetch(job.fetch, job.input.storage_options)
    contained = Contained(job.image.max_memory_bytes, PRELOAD)
    for row in rows:
        ref = Ref(*(row.pop(f"fetch_{name}") for name in ("uri", "offset", "length")))
        lines = answer_lines(row, summary="text" in job.instructions)
        row["lines"], row["more"] = lines[:LINES], max(0, len(lines) - LINES)
        row["picture"] = None
        if row["error_code"] is None and job.modality == "image":
            row["picture"] = _picture(job, fetch, contained, ref)
    contained.close()
    return rows


def failures(
    db: duckdb.DuckDBPyConnection, folder: Store, assembly: Assembly
) -> list[dict[str, Any]]:
    """uri, error_code, error_message and attempts of the first failed spans."""
    columns = ["asset_id", "uri", "error_code", "error_message", "attempts"]
    query = "SELECT batch.* FROM batch SEMI JOIN found USING (asset_id) LIMIT $limit"
    return _rows(db, folder, assembly, FAILURES_FOLDER, columns, query, FAILURES)


def _rows(
    db: duckdb.DuckDBPyConnection,
    folder: Store,
    assembly: Assembly,
    kind: str,
    columns: list[str],
    query: str,
    limit: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    # The newest parts come last, and hold what this run did.
    for item in reversed(assembly.parts):
        if item.name.startswith(kind) and len(rows) < limit:
            db.register("batch", read_part(folder, item.name, columns))
            found: pa.Table = db.sql(query, params={"limit": limit - len(rows)}).to_arrow_table()
            rows += found.to_pylist()
    return rows


def answer_lines(row: dict[str, Any], *, summary: bool) -> list[tuple[str, str]]:
    """(time, text) of a row's TIMED columns, in order of time; without one where an answer has none.

    What was said in a video stands in quotation marks. `summary`: text is more than its segments'.
    """
    said = [(one, f"“{one['text']}”") for one in row["transcript_segments"] or ()]
    seen = [(one, one["text"]) for one in row["segments"] or ()]
    timed = sorted([*seen, *said], key=lambda line: float(line[0]["start_s"]))
    lines = [(clock(one["start_s"]), text) for one, text in timed]
    if row["text"] and (summary or not timed):
        lines.insert(0, ("", row["text"]))
    return lines


def _picture(job: Job, fetch: Fetch, contained: Contained, ref: Ref) -> str | None:
    try:
        data = fetch(ref).data
        small = contained.submit(thumbnail, data, job.image, timeout_s=job.image.timeout_s).result()
    except MediaError:
        return None  # it was there for the run; the report does without
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
