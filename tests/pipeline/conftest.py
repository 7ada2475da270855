"""A place for files, on local disk and on S3; runs whose work is scripted."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import duckdb
import pytest
from listing import touch
from nights import Killed, Night, Outcome, answered, commit, divide, rows_of
from rich.console import Console

import pipeline.run
from operators.divide import Track
from pipeline import ledger
from pipeline.config import Job
from pipeline.run import Finished, run
from pipeline.store import Store
from pipeline.summaries import tell


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, s3):
    """Put files somewhere: `put(names)` gives the prefix and its storage options."""

    def put(*names):
        if request.param == "local":
            touch(tmp_path, *names)
            return str(tmp_path), {}
        prefix = f"{s3.bucket()}/raw"
        for name in names:
            s3.put(f"{prefix}/{name}", name.encode())
        return prefix, s3.options

    return put


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    (tmp_path / "in").mkdir()
    divide(monkeypatch, "audio", Track("mix", [(0.0, 300.0)]))
    numbers = itertools.count()
    monkeypatch.setattr(pipeline.run, "new_run_id", lambda: f"20260101T{next(numbers):06d}Z")
    monkeypatch.setattr(pipeline.run, "cluster", lambda *_: nullcontext(lambda: None))
    made = Night(tmp_path / "in", tmp_path / "out", {"task": "transcribe"})
    made.add(*"abcd")
    return made


@pytest.fixture
def go(night: Night, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    def go(outcome: Outcome = answered, dies: bool = False, **sections: Any) -> Finished:
        """`dies`: when the rows are in the ledger."""

        def work(
            job: Job,
            folder: Store,
            leased: Store,
            db: duckdb.DuckDBPyConnection,
            plan: Any,
            *_: object,
        ) -> dict[str, float]:
            commit(folder, f"{plan.run_id}-media", rows_of(db, "media"), plan.run_id, outcome)
            ledger.load(db, folder)
            if dies:
                raise Killed
            tell(db)
            summaries = rows_of(db, "summaries")
            night.told += [row["variables"] for row in summaries]
            commit(folder, f"{plan.run_id}-summaries", summaries, plan.run_id, outcome)
            ledger.load(db, folder)
            return {}

        monkeypatch.setattr(pipeline.run, "_work", work)
        return run(night.job(**sections), Console(file=io.StringIO()))

    return go
