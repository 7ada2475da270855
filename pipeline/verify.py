"""Is an output whole? Reads the marker and everything it lists, and says what does not fit."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from operators.schema import FAILED, RESULTS
from pipeline import ledger
from pipeline.assemble import FAILURES_FOLDER, MARKER, RESULTS_FOLDER, read_marker
from pipeline.plan import scratch
from pipeline.store import Store


def verify(uri: str, storage_options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(problems, the marker's accounts) of OUTPUT or OUTPUT/<fingerprint>.

    Checks that each listed part has its bytes, rows and columns, that nothing stands beside them, that
    no asset comes twice, that the ledger's spans are all in the results, and that the accounts close.
    """
    root = Store(uri, storage_options)
    try:
        fingerprint = json.loads(root.read("latest.json"))["fingerprint"]
    except FileNotFoundError:
        folder = root
    else:
        folder = Store(f"{uri.rstrip('/')}/{fingerprint}", storage_options)
    marker = read_marker(folder)
    if marker is None:
        return [f"{folder.url(MARKER)} is missing: no run has finished here"], {}
    return list(_problems(folder, marker)), marker["accounts"]


def _problems(folder: Store, marker: dict[str, Any]) -> Iterator[str]:
    seen: Counter[str] = Counter()
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
            seen.update(table["asset_id"].to_pylist())
    if twice := [asset_id for asset_id, count in seen.items() if count > 1]:
        yield f"{len(twice)} assets come twice in results, for example {twice[0]}"
    yield from _strays(folder, marker)
    yield from _accounts(folder, marker["accounts"], seen)


def _strays(folder: Store, marker: dict[str, Any]) -> Iterator[str]:
    listed = {item["name"] for item in marker["files"]}
    for kind in (RESULTS_FOLDER, FAILURES_FOLDER):
        for name in folder.names(kind, ".parquet"):
            if name not in listed:
                yield f"{name}: not listed in {MARKER} (left by a run that did not finish)"


def _accounts(folder: Store, accounts: dict[str, Any], seen: Counter[str]) -> Iterator[str]:
    assets, spans = accounts["assets"], accounts["spans"]
    if assets["found"] != sum(assets[state] for state in ("ok", "empty", "partial", "failed")):
        yield f"the accounts of assets do not close: {assets}"
    if spans["planned"] != sum(spans[state] for state in ("ok", "empty", "failed")):
        yield f"the accounts of spans do not close: {spans}"
    if len(seen) != accounts["result_rows"]:
        yield f"results have {len(seen)} assets, {MARKER} says {accounts['result_rows']}"
    with scratch() as db:
        try:
            ledger.load(db, folder)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            yield f"the ledger cannot be read: {error}"
            return
        known = {asset_id for (asset_id,) in db.execute("SELECT asset_id FROM ledger").fetchall()}
    if strange := seen.keys() - known:
        yield f"{len(strange)} results have no span in the ledger, for example {min(strange)}"
