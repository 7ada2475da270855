"""What runs that were killed, or saw only a part of the input, leave to the next: everything but the work
between plan and ledger is real, and needs no Ray."""

from __future__ import annotations

import io
import itertools
import json
import random
import string
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import pipeline.plan
import pipeline.run
from operators.divide import Track, divided
from operators.parse import sealed
from operators.schema import DIVIDED, LEDGER
from operators.tracks import FRAMES, SUMMARY
from pipeline import ledger
from pipeline.config import Job
from pipeline.parts import parquet_bytes
from pipeline.run import Finished, folder_store, run
from pipeline.store import Store
from pipeline.summaries import tell
from pipeline.verify import verify

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

    def cut(job: Job, db: duckdb.DuckDBPyConnection, connect: object) -> None:
        ids = [row[0] for row in db.execute("SELECT asset_id FROM unfinished").fetchall()]
        rows = [row for asset_id in ids for row in divided(asset_id, list(tracks))]
        db.register("rows", pa.Table.from_pylist(rows, schema=DIVIDED))
        db.execute("CREATE TABLE divided AS SELECT * FROM rows")

    monkeypatch.setitem(pipeline.plan.DIVIDE, modality, cut)


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


def test_a_retry_is_not_forgotten_when_runs_in_between_did_not_list_its_asset(
    night: Night, go: Callable[..., Finished]
) -> None:
    lost = failed("fetch.unavailable")
    go(lambda row: lost if row["uri"].endswith("d.wav") else answered(row))
    with pytest.raises(Killed):
        go(dies=True)
    night.add("0")
    go(limits={"max_assets": 2})
    assert night.said()["d"] == ("failed", None)
    last = go()
    assert (last.did_work, night.said()["d"]) == (False, ("ok", "d 0"))
    before = night.folder.read("_SUCCESS")
    go()
    assert night.folder.read("_SUCCESS") == before


@pytest.mark.parametrize("step", ["drop_replaced", "write_latest"])
def test_what_follows_the_marker_is_done_by_the_next_run_where_one_was_killed_there(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    lost = failed("fetch.unavailable")
    go(lambda row: lost if row["uri"].endswith("d.wav") else answered(row))
    (night.output / "latest.json").unlink()

    def dies(*_: object) -> None:
        raise Killed

    real = getattr(pipeline.run, step)
    monkeypatch.setattr(pipeline.run, step, dies)
    with pytest.raises(Killed):
        go()
    monkeypatch.setattr(pipeline.run, step, real)
    assert verify(str(night.output), {})[0]
    assert not go().did_work
    assert verify(str(night.output), {})[0] == []
    found = duckdb.sql(f"SELECT uri FROM '{night.folder.url('results')}/*.parquet'").fetchall()
    assert len(found) == 4


def test_latest_is_left_to_the_fingerprint_of_the_newest_run(
    night: Night, go: Callable[..., Finished]
) -> None:
    go()
    go(audio={"language": "English"})
    newest = json.loads((night.output / "latest.json").read_text())
    go()
    assert json.loads((night.output / "latest.json").read_text()) == newest
    assert newest["fingerprint"] == night.job(audio={"language": "English"}).fingerprint


@pytest.mark.parametrize("kind", ["results", "failures"])
def test_a_part_that_was_lost_is_made_again(
    night: Night, go: Callable[..., Finished], kind: str
) -> None:
    corrupt = failed("decode.corrupt")
    go(lambda row: corrupt if row["uri"].endswith("d.wav") else answered(row))
    before = night.said()
    (part,) = Path(night.folder.url(kind)).glob("*.parquet")
    part.unlink()
    assert verify(str(night.output), {})[0]
    assert not go().did_work
    assert verify(str(night.output), {})[0] == []
    assert night.said() == before
    names = night.folder.names("failures")
    assert sum(pq.read_metadata(night.folder.url(name)).num_rows for name in names) == 1


def test_a_ledger_that_cannot_be_read_is_named(night: Night, go: Callable[..., Finished]) -> None:
    go()
    (part,) = Path(night.folder.url("ledger")).glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    (problem,) = verify(str(night.output), {})[0]
    assert problem.startswith("the ledger cannot be read")


def test_a_file_that_cannot_be_probed_again_does_not_displace_its_spans(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = Track("mix", [(0.0, 300.0), (300.0, 600.0)])

    def outcome(row: Row) -> Row | None:
        looped = row["uri"].endswith("a.wav") and row["span_index"] == 1
        return failed("generate.looped") if looped else answered(row)

    divide(monkeypatch, "audio", spans)
    go(outcome)
    before = night.said()
    assert before["a"] == ("partial", "a 0")
    divide(monkeypatch, "audio", Track("mix", [(None, None)]))
    go(lambda row: failed("fetch.changed"), limits={"retry_failed": True})
    assert night.said() == before
    divide(monkeypatch, "audio", spans)
    night.add("e")
    go(outcome)
    assert night.said() == before | {"e": ("ok", "e 0 e 1")}


def test_a_failure_keeps_its_text_until_there_is_a_better_one(
    night: Night, go: Callable[..., Finished]
) -> None:
    half = failed("generate.looped", "half of it")
    go(lambda row: half if row["uri"].endswith("a.wav") else answered(row))
    again = {"limits": {"retry_failed": True}}
    go(lambda row: failed("fetch.unavailable"), **again)
    assert night.said()["a"] == ("partial", "half of it")
    go(lambda row: failed("generate.truncated", "more of it"), **again)
    assert night.said()["a"] == ("partial", "more of it")
    go(**again)
    assert night.said()["a"] == ("ok", "a 0")


def test_a_file_that_is_gone_takes_no_answer_with_it(
    night: Night, go: Callable[..., Finished]
) -> None:
    names = "".join(f"{name}.wav\n" for name in "ab")
    (night.source / "list.csv").write_text(f"uri\n{names}")
    listed = {"input": {"uri": str(night.source / "list.csv")}}
    go(**listed)
    (night.source / "a.wav").unlink()

    def outcome(row: Row) -> Row | None:
        return failed("fetch.not_found") if row["uri"].endswith("a.wav") else answered(row)

    go(outcome, **listed)
    found = [(Path(row["uri"]).stem, row["status"]) for row in night.results()]
    assert sorted(found) == [("a", "failed"), ("a", "ok"), ("b", "ok")]
    assert not go(outcome, **listed).did_work
    night.add("a")
    go(**listed)
    assert night.said() == {"a": ("ok", "a 0"), "b": ("ok", "b 0")}
    assert len(night.results()) == 2


def test_an_answer_without_a_version_replaces_the_one_with(
    night: Night, go: Callable[..., Finished]
) -> None:
    (night.source / "list.csv").write_text("uri\na.wav\nb.wav\n")
    listed = {"uri": str(night.source / "list.csv")}
    go(input=listed)

    def outcome(row: Row) -> Row | None:
        return failed("fetch.timeout") if row["uri"].endswith("b.wav") else answered(row)

    go(outcome, input=listed | {"stat": False})
    found = [(Path(row["uri"]).stem, row["status"]) for row in night.results()]
    assert sorted(found) == [("a", "ok"), ("b", "failed"), ("b", "ok")]
    go(input=listed)
    assert [row["status"] for row in night.results()] == ["ok", "ok"]
    assert all(row["version"] for row in night.results())


def test_a_summary_is_told_again_where_the_run_that_mended_its_video_died(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    night.sections = {"task": "describe-video", "video": {"summary": True}}
    (night.source / "a.mp4").write_bytes(b"a")
    shots = Track(FRAMES, [(0.0, 60.0), (60.0, 120.0)])
    divide(monkeypatch, "video", shots, Track(SUMMARY, [(None, None)]))

    def half(row: Row) -> Row | None:
        return failed("fetch.timeout") if row["span_index"] == 1 else answered(row)

    go(half)
    with pytest.raises(Killed):
        go(dies=True)
    go(lambda row: failed("generate.looped"))
    assert not go().did_work  # it was asked, and its former answer stands
    assert night.said() == {"a": ("ok", "a 2")}
    assert len(night.told) == 2
    assert json.loads(night.told[0])["failed"] == "fetch.timeout"
    assert json.loads(night.told[1])["failed"] is None


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
