"""The ledger: finished spans, one atomic Parquet object a write task.

    LedgerSink   Ray Data's last stage: commits rows as they finish
    load         all of a fingerprint's ledger into DuckDB, each span in one state
    fold         many small parts to few

A part's name comes from run, pass and task, so a write task that is retried replaces its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from ray.data.datasource import Datasink

from operators.schema import LEDGER
from pipeline.parts import ROWS_A_PART, parquet_bytes, tables
from pipeline.store import Store

FOLDER = "ledger"

# Each part costs every later run some requests. So many of write tasks may lie there, and of results.
MOST_SMALL_PARTS = 64
FOLDED = "-folded-"

# A span that came twice (a node was lost after the commit, or a failure was asked again) counts once:
# the better state, a failure that kept a part of its text before one that did not, then the newer.
BETTER = "CASE status WHEN 'ok' THEN 0 WHEN 'empty' THEN 1 ELSE 2 END, has_text DESC"
ONE_STATE = f"""
    QUALIFY row_number() OVER (PARTITION BY span_id ORDER BY {BETTER}, finished_at DESC) = 1
"""

# How an asset is divided into spans may change between runs (audio.span_s is no part of the question).
# Its id holds the division, and of several divisions the one that is whole counts, then one of which
# a span is done (a file that cannot be probed is one failed span), then the newer.
ONE_DIVISION = """
    SELECT asset_id, division FROM states GROUP BY asset_id, division, span_count
    QUALIFY row_number() OVER (
        PARTITION BY asset_id
        ORDER BY count(*) = span_count DESC, bool_or(status != 'failed' OR has_text) DESC,
            max(finished_at) DESC
    ) = 1
"""

# Text that is worked on at a time, and what a row has of it: its segments say the same again.
SLICE_BYTES = 64 << 20
ROW_BYTES = "500 + 2 * coalesce(strlen(text), 0) + coalesce(strlen(structured), 0)"

SUMS = ("fetch_s", "decode_s", "prepare_s", "generate_s")
TOKENS = ("prompt_tokens", "media_tokens", "output_tokens")


class LedgerSink(Datasink[int]):  # type: ignore[misc]
    """Commits rows to OUTPUT/<fingerprint>/ledger, in parts called `name` and a number.

    `report` gets the counts of each part.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rows_per_part: int,
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self._store = store
        self._name = name
        self._rows_per_part = rows_per_part
        self._report = report

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_part

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> int:  # noqa: ANN401
        tables = [block.cast(LEDGER) for block in blocks if block.num_rows]
        if not tables:
            return 0
        table = pa.concat_tables(tables)
        self._store.write(f"{FOLDER}/{self._name}-{ctx.task_idx:06d}.parquet", parquet_bytes(table))
        self._report(part_counts(table))
        return int(table.num_rows)


def part_counts(table: pa.Table) -> dict[str, float]:
    """Rows by status, sums of seconds and tokens: what the live view shows."""
    status = table["status"]
    counts = {
        name: float(pc.sum(pc.equal(status, name)).as_py() or 0)
        for name in ("ok", "empty", "failed")
    }
    return counts | {name: float(pc.sum(table[name]).as_py() or 0) for name in (*SUMS, *TOKENS)}


def load(db: duckdb.DuckDBPyConnection, store: Store) -> None:
    """(Re)make `states` and `ledger`: span ids and states of everything committed so far.

    `states` has every span once, `ledger` only those of each asset's one division. Texts stay in the
    store; `bring` fetches those that are wanted.
    """
    names = store.names(FOLDER, ".parquet")
    try:
        db.register("ledger_parts", _dataset(store, names) if names else LEDGER.empty_table())
        db.execute(
            f"""CREATE OR REPLACE TABLE states AS
            SELECT span_id, asset_id, division, span_count, track, status, has_text, error_code,
                sealed, run_id, finished_at
            FROM ledger_parts {ONE_STATE}"""
        )
    except (duckdb.Error, FileNotFoundError):
        if store.names(FOLDER, ".parquet") == names:
            raise
        return load(db, store)  # another run, which ends just now, has folded them
    db.execute(
        f"""CREATE OR REPLACE TABLE ledger AS
        SELECT states.* FROM states SEMI JOIN ({ONE_DIVISION}) USING (asset_id, division)"""
    )


def fold(store: Store, run_id: str) -> None:
    """Write the parts of write tasks anew as few, where they have become many, then remove them.

    A run that is killed between the two leaves rows twice, each of which counts once.
    """
    small = [name for name in store.names(FOLDER, ".parquet") if FOLDED not in name]
    if len(small) <= MOST_SMALL_PARTS:
        return
    rows = _dataset(store, small).to_batches()
    for number, table in enumerate(tables(rows, ROWS_A_PART)):
        store.write(f"{FOLDER}/{run_id}{FOLDED}{number:06d}.parquet", parquet_bytes(table))
    store.delete(small)


def _dataset(store: Store, names: list[str]) -> pads.Dataset:
    filesystem, root = store.arrow()
    paths = [f"{root}/{name}" for name in names]
    return pads.dataset(paths, schema=LEDGER, format="parquet", filesystem=filesystem)


def segments_of(which: str) -> str:
    """An aggregate over ledger rows: the segments of those for which `which` holds, in the order of
    time (channels of one sound lie side by side); null where there is none."""
    return f"""list_sort(flatten(list(segments ORDER BY span_index)
                               FILTER ({which} AND segments IS NOT NULL)))"""


def bring(db: duckdb.DuckDBPyConnection, spans: str) -> Iterator[str]:
    """Fetch whole ledger rows to the driver's disk; yields queries of them, a slice each, by `place`.

    `spans` is a query of rows of `states`, with the `place` of their asset. A slice has whole assets
    and some SLICE_BYTES of text: DuckDB's aggregates into lists hold all of it, and don't spill.
    """
    db.execute(
        f"""CREATE OR REPLACE TABLE wanted AS
        SELECT span_id, run_id, finished_at, place FROM ({spans})"""
    )
    # DuckDB takes an Arrow dataset for one row, and would build the join on all of its texts.
    db.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    # In order, so that a slice is read and not looked for.
    db.execute(
        """CREATE OR REPLACE TABLE brought AS
        SELECT * FROM ledger_parts JOIN wanted USING (span_id, run_id, finished_at) ORDER BY place"""
    )
    db.execute("SET disabled_optimizers = ''")
    slices = db.execute(
        f"""SELECT min(place), max(place) FROM (
            SELECT place, sum(bytes) OVER (ORDER BY place) // {SLICE_BYTES} AS slice
            FROM (SELECT place, sum({ROW_BYTES}) AS bytes FROM brought GROUP BY place)
        ) GROUP BY slice ORDER BY slice"""
    ).fetchall()
    for first, last in slices:
        yield f"(SELECT * FROM brought WHERE place BETWEEN {first} AND {last} {ONE_STATE})"
