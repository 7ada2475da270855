"""Runs over one input, night after night: everything but the work between plan and ledger is real, and
needs no Ray. The fixtures `night` and `go` are in tests/pipeline/conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.plan
from operators.divide import Track, divided
from operators.parse import sealed
from operators.schema import DIVIDED, LEDGER
from pipeline.config import Job
from pipeline.parts import parquet_bytes
from pipeline.run import folder_store
from pipeline.store import Store

Row = dict[str, Any]
# The outcome of a row of the plan: ledger fields, or None where the run dies before it.
Outcome = Callable[[Row], Row | None]


class Killed(BaseException):
    pass


@dataclass
class Night:
    """Runs over one input, one after the other."""

    source: Path
    output: Path
    sections: Row
    told: list[str] = field(default_factory=list)

    def add(self, *names: str) -> None:
        for name in names:
            (self.source / f"{name}.wav").write_bytes(name.encode())

    def job(self, **sections: Any) -> Job:
        fields = {"input": {"uri": str(self.source)}, "output": {"uri": str(self.output)}}
        fields |= {"model": {"id": "some/model"}}
        return Job.model_validate(fields | self.sections | sections)

    @property
    def folder(self) -> Store:
        return folder_store(self.job())

    def results(self) -> list[Row]:
        listed = json.loads(self.folder.read("_SUCCESS"))["files"]
        names = [item["name"] for item in listed if item["name"].startswith("results")]
        rows = [row for name in names for row in pq.read_table(self.folder.url(name)).to_pylist()]
        return sorted(rows, key=lambda row: row["uri"])

    def said(self) -> dict[str, tuple[str, str | None]]:
        return {Path(row["uri"]).stem: (row["status"], row["text"]) for row in self.results()}


def answered(row: Row) -> Row:
    return {"status": "ok", "text": f"{Path(row['uri']).stem} {row['span_index']}"}


def failed(code: str, text: str | None = None) -> Row:
    return {"status": "failed", "error_code": code, "text": text}


def rows_of(db: duckdb.DuckDBPyConnection, table: str) -> list[Row]:
    return db.sql(f"SELECT * FROM {table} ORDER BY place").to_arrow_table().to_pylist()


def commit(folder: Store, name: str, rows: list[Row], run_id: str, outcome: Outcome) -> None:
    done = []
    for row in rows:
        if (fields := outcome(row)) is None:
            break
        whole = row | fields | {"run_id": run_id, "finished_at": datetime.now(UTC)}
        whole["sealed"] = sealed(fields.get("error_code"), row["version"])
        whole["has_text"] = bool(fields["text"])
        done.append({column: whole.get(column) for column in LEDGER.names})
    if done:
        table = pa.Table.from_pylist(done, schema=LEDGER)
        folder.write(f"ledger/{name}.parquet", parquet_bytes(table))


def divide(monkeypatch: pytest.MonkeyPatch, modality: str, *tracks: Track) -> None:
    """Cut each file into these tracks from now on."""

    def cut(job: Job, db: duckdb.DuckDBPyConnection, *_: object) -> None:
        ids = [row[0] for row in db.execute("SELECT asset_id FROM unfinished").fetchall()]
        rows = [row for asset_id in ids for row in divided(asset_id, list(tracks))]
        db.register("rows", pa.Table.from_pylist(rows, schema=DIVIDED))
        db.execute("CREATE TABLE divided AS SELECT * FROM rows")

    monkeypatch.setitem(pipeline.plan.DIVIDE, modality, cut)
