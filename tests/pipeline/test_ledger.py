"""The ledger's parts: read in slices that fit memory, folded when they are many, named when broken."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from nights import Killed, Night, Row, answered, divide, failed

import pipeline.plan
import pipeline.run
from operators.divide import Track
from pipeline import ledger
from pipeline.plan import scratch
from pipeline.run import Finished
from pipeline.store import Store
from pipeline.verify import verify


def test_slices_of_text_give_the_same_results_as_one(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, "audio", Track("mix", [(0.0, 300.0), (300.0, 600.0), (600.0, 900.0)]))
    monkeypatch.setattr(ledger, "SLICE_BYTES", 2000)  # an asset and a part of the next
    slices = []
    bring = ledger.bring
    monkeypatch.setattr(
        ledger, "bring", lambda *asked: (slices.append(rows) or rows for rows in bring(*asked))
    )

    def outcome(row: Row) -> Row | None:
        if row["uri"].endswith("c.wav") and row["span_index"] == 1:
            return failed("generate.looped")
        return answered(row)

    finished = go(outcome)
    assert len(slices) == 4
    assert night.said() == {
        name: ("partial", "c 0 c 2") if name == "c" else ("ok", f"{name} 0 {name} 1 {name} 2")
        for name in "abcd"
    }
    assert finished.accounts["failures_by_code"] == {"generate.looped": 1}


def test_the_ledgers_texts_need_not_fit_memory(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where all of them are put together, nor where none is."""
    divide(monkeypatch, "audio", Track("mix", [(0.0, 300.0)] * 20))
    monkeypatch.setattr(pipeline.plan, "MEMORY_LIMIT", "120MB")
    monkeypatch.setattr(ledger, "SLICE_BYTES", 8 << 20)
    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=1_000_000))

    def outcome(row: Row) -> Row:
        begin = 37 * row["place"] + 4500 * row["span_index"]
        return {"status": "ok", "text": letters[begin : begin + 4500]}

    for letter in "ef":
        night.add(*(f"{letter}{number}" for number in range(600)))
        go(outcome)
    assert not go().did_work
    night.add("z")
    assert go().did_work
    assert len(night.results()) == 1205
    assert {status for status, _ in night.said().values()} == {"ok"}


def test_a_ledger_that_cannot_be_read_is_named(night: Night, go: Callable[..., Finished]) -> None:
    go()
    (part,) = Path(night.folder.url("ledger")).glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    (problem,) = verify(str(night.output), {})[0]
    assert problem.startswith("the ledger cannot be read")


def test_many_small_parts_of_the_ledger_become_few(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs every later run requests: of 10,000 new files a night 57,000 lay there after a year."""
    monkeypatch.setattr(ledger, "MOST_SMALL_PARTS", 4)
    monkeypatch.setattr(ledger, "ROWS_A_PART", 5)
    for name in "efgh":
        night.add(name)
        go()
    parts = night.folder.names("ledger")
    assert len(parts) == 4
    night.add("i")
    half = failed("generate.looped", "half of it")
    go(lambda row: half)
    folded = night.folder.names("ledger")
    assert len(folded) == 2
    assert not {*parts} & {*folded}
    rows = [pq.read_table(night.folder.url(name)) for name in folded]
    assert sum(table.num_rows for table in rows) == 9
    assert not go().did_work
    assert night.folder.names("ledger") == folded
    go(limits={"retry_failed": True})
    assert night.said() == {name: ("ok", f"{name} 0") for name in "abcdefghi"}
    assert verify(str(night.output), {})[0] == []


def test_a_run_that_is_killed_while_parts_are_folded_doubles_nothing(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MOST_SMALL_PARTS", 1)
    go()
    night.add("e")

    def killed(store: Store, names: list[str]) -> None:
        if names[0].startswith(ledger.FOLDER):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.run.LeasedStore, "delete", killed)
        with pytest.raises(Killed):
            go()
    assert len(night.folder.names("ledger")) == 3
    before = night.said()
    (night.source / "a.wav").write_bytes(b"other")
    # so that all rows are put together anew
    for part in Path(night.folder.url("results")).glob("*.parquet"):
        part.unlink()
    finished = go()
    assert night.said() == before == {name: ("ok", f"{name} 0") for name in "abcde"}
    assert finished.accounts["spans"]["ok"] == 5
    assert verify(str(night.output), {})[0] == []
    assert all("-folded-" in name for name in night.folder.names("ledger"))


def test_a_run_that_looks_while_another_folds_looks_again(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    go()
    names = Store.names
    monkeypatch.setattr(ledger, "MOST_SMALL_PARTS", 0)

    def then_folded(store: Store, folder: str, *suffix: str) -> list[str]:
        listed = names(store, folder, *suffix)
        monkeypatch.setattr(Store, "names", names)
        ledger.fold(night.folder, "another")
        return listed

    with scratch() as db:
        monkeypatch.setattr(Store, "names", then_folded)
        ledger.load(db, night.folder)
        (spans,) = db.execute("SELECT count(*) FROM ledger").fetchall()[0]
    assert spans == 4
    assert all(ledger.FOLDED in name for name in night.folder.names(ledger.FOLDER))
