"""Is an output whole? Reads the marker and everything it lists, and says what does not fit."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from operators.schema import FAILED, RESULTS
from pipeline import ledger
from pipeline.assemble import FAILURES_FOLDER, MARKER, RESULTS_FOLDER, open_finished
from pipeline.plan import scratch
from pipeline.store import Store


def verify(uri: str, storage_options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(problems, the marker's accounts) of OUTPUT or OUTPUT/<fingerprint>.

    Checks that each listed part has its bytes, rows and columns, that nothing stands beside them, that
    no asset comes twice, that the ledger has every result's spans, and that the accounts close.
    Raises SourceError where the store says nothing.
    """
    folder, marker = open_finished(uri, storage_options)
    if marker is None:
        return [f"{folder.url(MARKER)} is missing: no run has finished here"], {}
    with scratch() as db:
        return list(_problems(folder, marker, db)), marker["accounts"]


def _problems(
    folder: Store, marker: dict[str, Any], db: duckdb.DuckDBPyConnection
) -> Iterator[str]:
    db.execute("CREATE TABLE seen (asset_id VARCHAR)")
    for item in marker["files"]:
        try:
            data = folder.read(item["name"])
        except FileNotFoundError:
            yield f"{item['name']}: listed in {MARKER}, but missing"
            continue
        if hashlib.sha256(data).hexdigest() != item["sha256"]:
            yield f"{item['name']}: its bytes are not those that were written"
            continue
        table = pq.read_table(io.BytesIO(data))
        if table.num_rows != item["rows"]:
            yield f"{item['name']}: {table.num_rows} rows, {MARKER} says {item['rows']}"
        is_result = item["name"].startswith(RESULTS_FOLDER)
        schema = RESULTS if is_result else FAILED
        if not table.schema.equals(schema):
            yield f"{item['name']}: its columns are not those of this version"
        if is_result:
            db.register("part", table.select(["asset_id"]))
            db.execute("INSERT INTO seen SELECT * FROM part")
    twice, example = _named(db, "SELECT asset_id FROM seen GROUP BY asset_id HAVING count(*) > 1")
    if twice:
        yield f"{twice} assets come twice in results, for example {example}"
    yield from _strays(folder, marker)
    yield from _accounts(folder, marker["accounts"], db)


def _named(db: duckdb.DuckDBPyConnection, assets: str) -> tuple[int, str]:
    """How many, and the first of them."""
    row: tuple[int, str] = db.execute(
        f"SELECT count(DISTINCT asset_id), min(asset_id) FROM ({assets})"
    ).fetchall()[0]
    return row


def _strays(folder: Store, marker: dict[str, Any]) -> Iterator[str]:
    listed = {item["name"] for item in marker["files"]}
    for kind in (RESULTS_FOLDER, FAILURES_FOLDER):
        for name in folder.names(kind, ".parquet"):
            if name not in listed:
                yield f"{name}: not listed in {MARKER} (left by a run that did not finish)"


def _accounts(
    folder: Store, accounts: dict[str, Any], db: duckdb.DuckDBPyConnection
) -> Iterator[str]:
    assets, spans = accounts["assets"], accounts["spans"]
    if assets["found"] != sum(assets[state] for state in ("ok", "empty", "partial", "failed")):
        yield f"the accounts of assets do not close: {assets}"
    if spans["planned"] != sum(spans[state] for state in ("ok", "empty", "failed")):
        yield f"the accounts of spans do not close: {spans}"
    seen, _ = _named(db, "SELECT asset_id FROM seen")
    if seen != accounts["result_rows"]:
        yield f"results have {seen} assets, {MARKER} says {accounts['result_rows']}"
    try:
        ledger.load(db, folder)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        yield f"the ledger cannot be read: {error}"
        return
    strange, example = _named(db, "SELECT asset_id FROM seen ANTI JOIN ledger USING (asset_id)")
    if strange:
        yield f"{strange} results have no span in the ledger, for example {example}"
