"""What is to do: the assets found now, cut into spans, minus the spans that the ledger has sealed.

The plan lives in DuckDB on the driver's disk (joins over 10^8 ids spill instead of filling memory), and
the spans to do go to OUTPUT/<fingerprint>/plan as Parquet, from where every worker reads its share.

    tables   found(FOUND + place)         each asset once, in the order of the listing
             states, ledger               pipeline/ledger.py
             unfinished(FOUND + place)    assets with spans to do
             divided(asset_id, span_..)   their spans
             todo(PLAN + place)           spans to do now; media: those that are no summaries
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa

from operators.schema import FOUND, PLAN
from operators.tracks import FRAMES, IMAGE, SUMMARY
from pipeline import ledger
from pipeline.cluster import Connect
from pipeline.compute import Lengths
from pipeline.config import Job
from pipeline.divide import SayCount, divide_files
from pipeline.parts import batches, parquet_bytes, tables
from pipeline.source import Source
from pipeline.store import Store

FOLDER = "plan"
ROWS_A_PART = 16_384
MEDIA = "media"
# Each of DuckDB's threads holds some of it: with 8 it fails where 4 are enough.
MEMORY_LIMIT, MOST_THREADS = "2GB", 4


@dataclass(frozen=True)
class Plan:
    """Counts of what was found and what is left."""

    run_id: str
    assets: int
    bytes: int
    duplicates: int
    # asked about with several variables, and no source_id tells their results apart
    nameless: int
    skipped: dict[str, int]
    spans: int
    spans_todo: int
    # of spans_todo; None for images, and where nothing of it could be probed
    lengths: Lengths | None

    def line(self) -> str:
        """Counts for people."""
        text = (
            f"{self.assets:,} assets ({self.bytes / 1e6:,.1f} MB), {self.spans:,} spans,"
            f" {self.spans_todo:,} to do"
        )
        if self.lengths:
            text += f" ({self.lengths.total_s / 3600:,.1f} hours)"
        if self.duplicates:
            text += f"; {self.duplicates:,} duplicate rows counted once"
        if self.nameless:
            text += (
                f"; {self.nameless:,} files stand in several rows with other variables: results will not"
                " say which row an answer is to. Name a column that does in input.id_column"
            )
        for reason, count in sorted(self.skipped.items()):
            text += f"; passed over: {count:,} {reason}"
        return text


@contextmanager
def scratch() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB database on local disk, gone at the end. Nothing in it is needed for a resume."""
    with TemporaryDirectory(prefix="polyscribe-") as folder:
        db = duckdb.connect(str(Path(folder) / "plan.duckdb"))
        try:
            db.execute(f"SET temp_directory = '{folder}/spill'")
            # Without it DuckDB takes 80 % of a machine that the engine and Ray need as well.
            db.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
            db.execute(f"SET threads = {min(MOST_THREADS, os.cpu_count() or 1)}")
            db.execute("SET preserve_insertion_order = false")
            db.execute("SET TimeZone = 'UTC'")
            yield db
        finally:
            db.close()


def make_plan(
    job: Job,
    db: duckdb.DuckDBPyConnection,
    store: Store,
    run_id: str,
    connect: Connect,
    progress: SayCount,
) -> Plan:
    """List, drop duplicates, cut into spans, take away what the ledger has.

    Raises SourceError where the input cannot be listed.
    """
    listed, skipped = _list(job, db, progress)
    assets, size = _one(db, "SELECT count(*), coalesce(sum(size_bytes), 0) FROM found")
    (nameless,) = _one(
        db,
        """SELECT count(*) FROM (
            SELECT uri FROM found WHERE variables IS NOT NULL AND source_id IS NULL
            GROUP BY uri HAVING count(DISTINCT variables) > 1
        )""",
    )
    ledger.load(db, store)
    # A summary is told again with what it is about; the run that did that may not have come to it.
    db.execute(
        f"""CREATE TABLE outdated AS
        WITH told AS (
            SELECT span_id, asset_id, division, max(run_id) AS told_in FROM ledger_parts
            WHERE track = '{SUMMARY}' GROUP BY ALL
        )
        SELECT span_id FROM told JOIN (
            SELECT asset_id, division, max(run_id) AS newest
            FROM states SEMI JOIN told USING (asset_id, division) GROUP BY ALL
        ) USING (asset_id, division) WHERE told_in < newest"""
    )
    db.execute(
        """CREATE TABLE sealed AS SELECT span_id, asset_id, division, span_count FROM states
        ANTI JOIN outdated USING (span_id)
        WHERE sealed AND NOT (status = 'failed' AND $retry_failed)""",
        {"retry_failed": job.limits.retry_failed},
    )
    db.execute(
        """CREATE TABLE finished AS SELECT DISTINCT asset_id, span_count FROM ledger
        JOIN (SELECT asset_id, division, span_count, count(*) AS spans FROM sealed GROUP BY ALL)
        USING (asset_id, division, span_count) WHERE spans = span_count"""
    )
    db.execute("CREATE TABLE unfinished AS SELECT * FROM found ANTI JOIN finished USING (asset_id)")
    DIVIDE[job.modality](job, db, connect, progress)
    db.execute(
        """CREATE VIEW spans AS
        SELECT printf('%s-%05d-%s', asset_id, span_index, division) AS span_id,
               divided.* EXCLUDE (asset_id), unfinished.*
        FROM unfinished JOIN divided USING (asset_id)"""
    )
    db.execute("CREATE TABLE todo AS SELECT * FROM spans ANTI JOIN sealed USING (span_id)")
    # of those done now as well
    db.execute(
        f"""INSERT INTO todo SELECT * FROM spans SEMI JOIN todo USING (asset_id)
        WHERE track = '{SUMMARY}' AND span_id IN (SELECT span_id FROM sealed)"""
    )
    db.execute(f"CREATE VIEW {MEDIA} AS SELECT * FROM todo WHERE track != '{SUMMARY}'")
    (before,) = _one(
        db,
        "SELECT coalesce(sum(span_count), 0) FROM finished SEMI JOIN found USING (asset_id)",
    )
    (spans,) = _one(db, "SELECT count(*) FROM divided")
    (todo,) = _one(db, "SELECT count(*) FROM todo")
    return Plan(
        run_id=run_id,
        assets=assets,
        bytes=size,
        duplicates=listed - assets,
        nameless=nameless,
        skipped=dict(skipped),
        spans=before + spans,
        spans_todo=todo,
        lengths=lengths(db),
    )


def lengths(db: duckdb.DuckDBPyConnection) -> Lengths | None:
    """Of the spans in `todo`; of a video's, what its pictures take in all and on average."""
    total_s, mean_s, longest_s = db.execute(
        f"""SELECT sum(seconds) FILTER (own), avg(seconds) FILTER (own), max(seconds) FROM (
            SELECT span_end_s - span_start_s AS seconds, modality = 'audio' OR track = '{FRAMES}' AS own
            FROM todo
        )"""
    ).fetchall()[0]
    return Lengths(total_s, mean_s, longest_s) if total_s else None


def write_plan(
    db: duckdb.DuckDBPyConnection, store: Store, run_id: str, spans: str
) -> tuple[str, ...]:
    """Put the rows of table `spans` into the store; returns the parts' names, in order."""
    columns = ", ".join(PLAN.names)
    query = db.sql(f"SELECT {columns} FROM {spans} ORDER BY place")
    names: list[str] = []
    for table in tables(batches(query), ROWS_A_PART):
        name = f"{FOLDER}/{run_id}-{spans}-{len(names):06d}.parquet"
        store.write(name, parquet_bytes(table.cast(PLAN)))
        names.append(name)
    return tuple(names)


def one_span(job: Job, db: duckdb.DuckDBPyConnection, connect: Connect, progress: SayCount) -> None:
    """An image is one span."""
    db.execute(
        f"""CREATE TABLE divided AS
        SELECT asset_id, 0::INTEGER AS span_index, 1::INTEGER AS span_count, '1' AS division,
               '{IMAGE}' AS track, 0::INTEGER AS track_index, 1::INTEGER AS track_count,
               NULL::DOUBLE AS span_start_s, NULL::DOUBLE AS span_end_s
        FROM unfinished"""
    )


# How the assets of a modality are cut into spans: fills `divided` from `unfinished`.
DIVIDE: dict[str, Callable[[Job, duckdb.DuckDBPyConnection, Connect, SayCount], None]] = {
    "image": one_span,
    "audio": divide_files,
    "video": divide_files,
}


def _list(job: Job, db: duckdb.DuckDBPyConnection, progress: SayCount) -> tuple[int, Counter[str]]:
    source = Source(job.input, job.modality)
    db.register("empty", FOUND.empty_table())
    db.execute("CREATE TABLE listed AS SELECT *, 0::BIGINT AS place FROM empty")
    listed = 0
    for batch in source.batches():
        rows = pa.Table.from_batches([batch])
        if job.limits.max_assets is not None:
            rows = rows.slice(0, job.limits.max_assets - listed)
        places = pa.array(range(listed, listed + rows.num_rows), pa.int64())
        db.register("batch", rows.append_column("place", places))
        db.execute("INSERT INTO listed SELECT * FROM batch")
        listed += rows.num_rows
        progress(listed, "assets listed")
        if listed == job.limits.max_assets:
            break
    db.execute(
        """CREATE TABLE found AS SELECT * FROM listed
        QUALIFY row_number() OVER (PARTITION BY asset_id ORDER BY place) = 1"""
    )
    db.execute("DROP TABLE listed")
    return listed, source.skipped


def _one(db: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    return tuple(int(value) for value in db.execute(query).fetchall()[0])
