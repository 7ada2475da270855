"""Spans to results: reconcile, one row an asset, failures, then the marker, last.

Results grow: a run writes rows for the assets it touched, and only those older parts that hold a row it
replaces (a failure asked again, changed bytes under an old URI) are written anew, and small ones that have
become many. A reader who goes by _SUCCESS sees one state or the next, never a mixture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from operators.schema import FAILED, MISSING, RESULTS
from operators.stitch import join
from operators.tracks import FRAMES, IMAGE, SUMMARY
from pipeline import ledger
from pipeline.cluster import BrokenRunError
from pipeline.config import Job
from pipeline.lease import LeasedStore
from pipeline.parts import ROWS_A_PART, Part, batches, parquet_bytes, part, tables
from pipeline.plan import Plan
from pipeline.source_rows import listing_faults, refusal
from pipeline.store import Store
from pipeline.subtitle_files import SUBTITLED, drop_subtitles, write_subtitles

MARKER = "_SUCCESS"
RESULTS_FOLDER, FAILURES_FOLDER = "results", "failures"
SCHEMAS = {RESULTS_FOLDER: RESULTS, FAILURES_FOLDER: FAILED}
# Of a part, in its file.
SMALL_BYTES = 4 << 20
# Spans of sound, by their track.
HEARD = f"track NOT IN ('{IMAGE}', '{FRAMES}', '{SUMMARY}')"


class LostSpansError(BrokenRunError):
    """The ledger and the plan do not agree. Nothing was assembled."""


@dataclass(frozen=True)
class Assembly:
    """What the marker lists."""

    parts: tuple[Part, ...]
    accounts: dict[str, Any]
    runs: tuple[str, ...]
    changed: bool


def read_marker(store: Store) -> dict[str, Any] | None:
    """The last finished state of this fingerprint, or None."""
    try:
        marker: dict[str, Any] = json.loads(store.read(MARKER))
    except FileNotFoundError:
        return None
    return marker


def open_finished(
    uri: str, storage_options: Mapping[str, Any]
) -> tuple[Store, dict[str, Any] | None]:
    """The folder of OUTPUT's newest fingerprint, or OUTPUT/<fingerprint> itself, and its marker.

    Raises SourceError where the store says nothing.
    """
    folder = Store(uri, storage_options)
    try:
        with suppress(FileNotFoundError):  # it is OUTPUT/<fingerprint>
            newest = json.loads(folder.read("latest.json"))["fingerprint"]
            folder = Store(f"{uri.rstrip('/')}/{newest}", storage_options)
        return folder, read_marker(folder)
    except listing_faults(uri) as error:
        raise refusal(uri, error) from error


def reconcile(db: duckdb.DuckDBPyConnection) -> None:
    """Every planned span must be in the ledger. Raises LostSpansError with the first ones missing."""
    missing = db.execute(
        "SELECT span_id, uri FROM todo ANTI JOIN states USING (span_id) ORDER BY place LIMIT 5"
    ).fetchall()
    if missing:
        (total,) = db.execute(
            "SELECT count(*) FROM todo ANTI JOIN states USING (span_id)"
        ).fetchall()[0]
        rows = ", ".join(f"{span_id} ({uri})" for span_id, uri in missing)
        raise LostSpansError(
            f"{total} planned spans are not in the ledger, for example {rows}."
            " Run the job again: it does the missing ones"
        )


def assemble(
    job: Job,
    db: duckdb.DuckDBPyConnection,
    store: LeasedStore,
    plan: Plan,
) -> Assembly:
    """Bring results and failures up to date with the ledger. Writes parts, not the marker."""
    marker = read_marker(store)
    listed = [Part(**entry) for entry in marker["files"]] if marker else []
    runs = list(marker["runs"]) if marker else []
    there = {*store.names(RESULTS_FOLDER), *store.names(FAILURES_FOLDER)}
    # A part that is gone is made again: its assets are in no base.
    base = [item for item in listed if item.name in there]
    lost = any(item.name.startswith(FAILURES_FOLDER) for item in listed if item.name not in there)
    _load_base(db, store, base)
    db.create_function("joined", _joined, ["VARCHAR[]", "VARCHAR[]"], "VARCHAR")
    db.create_function("merged", _merged, ["VARCHAR[]"], "VARCHAR")
    db.execute(
        # The newest of an asset's runs stands in its row. A run that was assembled while this asset was
        # not listed (limits.max_assets, another input) is in `runs`, and yet new to it.
        """CREATE OR REPLACE TABLE touched AS
        SELECT asset_id, min(place) AS place
        FROM found JOIN ledger USING (asset_id) LEFT JOIN base USING (asset_id)
        GROUP BY asset_id
        HAVING bool_or(NOT list_contains($runs, ledger.run_id))
            OR max(ledger.run_id) IS DISTINCT FROM any_value(base.run_id)
            OR ($lost AND any_value(base.status) IN ('failed', 'partial'))""",
        {"runs": runs, "lost": lost},
    )
    # Rows that leave: replaced now, or an older version of a file that is listed with another one. A new
    # one that is no version (the file is gone, or its store would not say) takes no answer with it, unless
    # it has one of its own.
    db.execute(
        """CREATE OR REPLACE TABLE leaving AS
        SELECT asset_id FROM touched
        UNION
        SELECT base.asset_id FROM base
        JOIN found ON base.uri = found.uri AND base.source_id IS NOT DISTINCT FROM found.source_id
        WHERE base.asset_id NOT IN (SELECT asset_id FROM found)
            AND (coalesce(found.version, '') NOT IN ('', $missing) OR found.asset_id IN (
                SELECT asset_id FROM ledger WHERE status != 'failed' OR has_text))""",
        {"missing": MISSING},
    )
    parts = list(_carry_over(db, store, base, plan.run_id))
    values = {
        "model": job.model.id,
        "revision": job.model.revision,
        "prompt": job.prompt_name,
    }
    slices = list(
        ledger.bring(db, "SELECT ledger.*, place FROM ledger JOIN touched USING (asset_id)")
    )
    results = (batch for rows in slices for batch in batches(db.sql(_results(rows), params=values)))
    made = [*_write(store, RESULTS_FOLDER, plan.run_id, results, RESULTS)]
    parts += made
    if job.modality != "image":
        # also where none are written now: former ones would say what results no longer say
        gone = db.sql("SELECT asset_id FROM leaving SEMI JOIN base USING (asset_id)").fetchall()
        drop_subtitles(store, {asset_id for (asset_id,) in gone})
        if job.output.subtitles:
            for item in made:
                write_subtitles(store, read_part(store, item.name, SUBTITLED))
    failures = (batch for rows in slices for batch in batches(db.sql(_failures(rows))))
    parts += _write(store, FAILURES_FOLDER, plan.run_id, failures, FAILED)
    # A run whose answers all lost against better ones has changed no part, and says what it did.
    changed = marker is None or parts != listed or plan.spans_todo > 0
    if changed:
        parts = [*_fold(store, parts, plan.run_id)]
    return Assembly(
        parts=tuple(parts),
        accounts=_accounts(db, store, plan, parts),
        runs=tuple(dict.fromkeys([*runs, *_new_runs(db)])),
        changed=changed,
    )


def write_marker(store: Store, run_id: str, assembly: Assembly) -> None:
    """Publish an assembly."""
    marker = {
        "run_id": run_id,
        "runs": assembly.runs,
        "accounts": assembly.accounts,
        "files": [vars(item) for item in assembly.parts],
    }
    store.write(MARKER, json.dumps(marker, indent=1).encode())


def drop_replaced(store: Store, assembly: Assembly) -> None:
    """Away with the parts that the marker no longer lists."""
    listed = {item.name for item in assembly.parts}
    names = [*store.names(RESULTS_FOLDER), *store.names(FAILURES_FOLDER)]
    if left := [name for name in names if name not in listed]:
        store.delete(left)


def _load_base(db: duckdb.DuckDBPyConnection, store: Store, base: list[Part]) -> None:
    db.execute(
        """CREATE OR REPLACE TABLE base
        (asset_id VARCHAR, uri VARCHAR, source_id VARCHAR, status VARCHAR, run_id VARCHAR)"""
    )
    for item in base:
        if item.name.startswith(RESULTS_FOLDER):
            names = ["asset_id", "uri", "source_id", "status", "run_id"]
            db.register("batch", read_part(store, item.name, names))
            db.execute("INSERT INTO base SELECT * FROM batch")


def _carry_over(
    db: duckdb.DuckDBPyConnection, store: Store, base: list[Part], run_id: str
) -> Iterator[Part]:
    """The older parts: as they are, or written anew without the rows that leave."""
    for place, item in enumerate(base):
        ids = read_part(store, item.name, ["asset_id"])
        db.register("batch", ids)
        (gone,) = db.execute(
            "SELECT count(*) FROM batch SEMI JOIN leaving USING (asset_id)"
        ).fetchall()[0]
        if not gone:
            yield item
        elif gone < item.rows:
            db.register("batch", read_part(store, item.name))
            kept = db.sql("SELECT * FROM batch ANTI JOIN leaving USING (asset_id)")
            folder = item.name.partition("/")[0]
            schema = SCHEMAS[folder]
            table = kept.to_arrow_table().select(schema.names).cast(schema)
            yield _put(store, f"{folder}/{run_id}-kept-{place:06d}.parquet", table)


def _fold(store: Store, parts: list[Part], run_id: str) -> Iterator[Part]:
    """Small parts as few, where they have become many; the others as they are.

    A schedule adds one or two a run, and each costs every later run some requests.
    """
    for folder, schema in SCHEMAS.items():
        own = [item for item in parts if item.name.startswith(folder)]
        small = [item for item in own if item.bytes < SMALL_BYTES]
        if len(small) <= ledger.MOST_SMALL_PARTS:
            yield from own
            continue
        yield from (item for item in own if item.bytes >= SMALL_BYTES)
        filesystem, root = store.arrow()
        paths = [f"{root}/{item.name}" for item in small]
        rows = pads.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)
        yield from _write(store, folder, f"{run_id}-folded", rows.to_batches(), schema)


def _write(
    store: Store,
    folder: str,
    name: str,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
) -> Iterator[Part]:
    for place, table in enumerate(tables(batches, ROWS_A_PART)):
        made = table.select(schema.names).cast(schema)
        yield _put(store, f"{folder}/{name}-{place:06d}.parquet", made)


def _put(store: Store, name: str, table: pa.Table) -> Part:
    data = parquet_bytes(table)
    store.write(name, data)
    return part(name, table, data)


def _joined(texts: list[str], tracks: list[str]) -> str:
    """The texts of an asset's spans, in order: a line a track, and a video's captions a line each."""
    lines = []
    for track, pieces in groupby(zip(tracks, texts, strict=True), key=itemgetter(0)):
        said = [text for _, text in pieces if text]
        lines.append("\n".join(said) if track == FRAMES else join(said))
    return "\n".join(line for line in lines if line)


def _merged(lists: list[str]) -> str:
    """JSON lists of an asset's spans as one."""
    return json.dumps([item for text in lists for item in json.loads(text)], ensure_ascii=False)


def read_part(store: Store, name: str, columns: list[str] | None = None) -> pa.Table:
    """One part of results or failures."""
    filesystem, root = store.arrow()
    return pq.read_table(f"{root}/{name}", columns=columns, filesystem=filesystem)


def _results(rows: str) -> str:
    """One row an asset, from the one state of each of its spans."""
    return f"""
    SELECT asset_id, any_value(uri) AS uri, any_value(source_id) AS source_id,
        any_value(version) AS version, any_value(modality) AS modality,
        CASE WHEN bool_and(status = 'failed' AND coalesce(text, '') = '') THEN 'failed'
             WHEN bool_or(status = 'failed') THEN 'partial'
             WHEN bool_and(status = 'empty') THEN 'empty' ELSE 'ok' END AS status,
        CASE WHEN count(*) = 1 THEN any_value(text)
             ELSE coalesce(nullif(any_value(text) FILTER (track = '{SUMMARY}'), ''), {_text("told")})
        END AS text,
        any_value(language) AS language,
        {ledger.segments_of("told")} AS segments,
        {_text("modality = 'video' AND heard")} AS transcript,
        {ledger.segments_of("modality = 'video' AND heard")} AS transcript_segments,
        CASE WHEN count(*) = 1 THEN any_value(structured)
             ELSE merged(list(structured ORDER BY span_index) FILTER (structured IS NOT NULL))
        END AS structured,
        any_value(width_px) AS width_px, any_value(height_px) AS height_px,
        max(duration_s) AS duration_s,
        $model AS model, $revision AS model_revision, $prompt AS prompt_name,
        arg_max(finish_reason, span_index) AS finish_reason,
        sum(prompt_tokens)::BIGINT AS prompt_tokens, sum(media_tokens)::BIGINT AS media_tokens,
        sum(output_tokens)::BIGINT AS output_tokens,
        arg_min(error_code, span_index) AS error_code,
        arg_min(error_stage, span_index) AS error_stage,
        string_agg(error_message, '; ' ORDER BY span_index) AS error_message,
        max(attempts) AS attempts, max(run_id) AS run_id
    FROM (SELECT *, {HEARD} AS heard, modality != 'video' OR track = '{FRAMES}' AS told
          FROM {rows})
    GROUP BY asset_id ORDER BY min(place)"""


def _text(which: str) -> str:
    """The texts of the spans for which `which` holds as one; null where there is none."""
    return f"""joined(list(text ORDER BY span_index) FILTER ({which} AND text IS NOT NULL),
                    list(track ORDER BY span_index) FILTER ({which} AND text IS NOT NULL))"""


def _failures(rows: str) -> str:
    return f"""
    SELECT {", ".join(FAILED.names)} FROM {rows}
    WHERE status = 'failed' ORDER BY place, span_index"""


def _new_runs(db: duckdb.DuckDBPyConnection) -> list[str]:
    return [
        run for (run,) in db.execute("SELECT DISTINCT run_id FROM ledger ORDER BY 1").fetchall()
    ]


def _accounts(
    db: duckdb.DuckDBPyConnection, store: Store, plan: Plan, parts: list[Part]
) -> dict[str, Any]:
    """Spans and assets of this run's input, counted from what was written. They close or it raises."""
    db.execute("CREATE OR REPLACE TABLE stated (asset_id VARCHAR, status VARCHAR)")
    for item in parts:
        if item.name.startswith(RESULTS_FOLDER):
            db.register("batch", read_part(store, item.name, ["asset_id", "status"]))
            db.execute("INSERT INTO stated SELECT * FROM batch")
    assets = _by_status(db, "stated SEMI JOIN found USING (asset_id)")
    spans = _by_status(db, "ledger SEMI JOIN found USING (asset_id)")
    # Not the plan's own count: where a file could not be probed again, its former division stands.
    (planned,) = db.execute(
        """SELECT coalesce(sum(span_count), 0)::BIGINT FROM (
            SELECT DISTINCT asset_id, span_count FROM ledger SEMI JOIN found USING (asset_id)
        )"""
    ).fetchall()[0]
    if sum(assets.values()) != plan.assets or sum(spans.values()) != planned:
        raise LostSpansError(
            f"the accounts do not close: {plan.assets} assets found, {assets} in results;"
            f" {planned} spans planned, {spans} in the ledger"
        )
    failures = db.execute(
        """SELECT error_code, count(*) FROM ledger SEMI JOIN found USING (asset_id)
        WHERE status = 'failed' GROUP BY 1 ORDER BY 2 DESC, 1"""
    ).fetchall()
    (rows,) = db.execute("SELECT count(*) FROM stated").fetchall()[0]
    states = ("ok", "empty", "failed")
    return {
        "assets": {
            "found": plan.assets,
            **{state: assets.get(state, 0) for state in ("ok", "empty", "partial", "failed")},
        },
        "spans": {"planned": planned, **{state: spans.get(state, 0) for state in states}},
        "failures_by_code": dict(failures),
        "done_now": plan.spans_todo,
        "done_before": max(0, planned - plan.spans_todo),
        "duplicates": plan.duplicates,
        "skipped": plan.skipped,
        # rows of assets that earlier runs found and this one did not list are kept
        "result_rows": rows,
    }


def _by_status(db: duckdb.DuckDBPyConnection, table: str) -> dict[str, int]:
    return dict(db.execute(f"SELECT status, count(*) FROM {table} GROUP BY status").fetchall())
