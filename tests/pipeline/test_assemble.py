"""What runs that were killed, or saw only a part of the input, leave to the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from nights import Killed, Night, Row, answered, divide, failed

import pipeline.run
from operators.divide import Track
from operators.tracks import FRAMES, SUMMARY
from pipeline import ledger
from pipeline.run import Finished
from pipeline.verify import verify


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


def test_a_run_whose_answers_all_lost_against_better_ones_is_finished(
    night: Night, go: Callable[..., Finished]
) -> None:
    half = failed("generate.looped", "half of it")
    go(lambda row: half if row["uri"].endswith("a.wav") else answered(row))
    parts = json.loads(night.folder.read("_SUCCESS"))["files"]
    assert go(lambda row: failed("fetch.unavailable"), limits={"retry_failed": True}).did_work
    told = json.loads(night.folder.read("run.json"))
    assert (told["state"], told["accounts"]["assets"]["partial"]) == ("finished", 1)
    assert json.loads(night.folder.read("report.json"))["run_id"] == told["run_id"]
    assert json.loads(night.folder.read("_SUCCESS"))["files"] == parts


def test_parts_that_have_become_many_are_folded(
    night: Night, go: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MOST_SMALL_PARTS", 3)

    def outcome(row: Row) -> Row:
        return failed("decode.corrupt") if row["uri"].endswith("y.wav") else answered(row)

    expected = {}
    for hour in range(9):
        night.add(f"{hour}x")
        night.add(f"{hour}y")
        go(outcome)
        expected |= {f"{hour}x": ("ok", f"{hour}x 0"), f"{hour}y": ("failed", None)}
        for folder in ("results", "failures"):
            assert 1 <= len(night.folder.names(folder)) <= 3
        assert verify(str(night.output), {})[0] == []
    said = night.said()
    assert said == said | expected
    folder = night.folder.url("failures")
    lost = duckdb.sql(f"SELECT uri FROM '{folder}/*.parquet'").fetchall()
    assert sorted(Path(uri).stem for (uri,) in lost) == [f"{hour}y" for hour in range(9)]
    listed = json.loads(night.folder.read("_SUCCESS"))["files"]
    assert not go(outcome).did_work
    assert json.loads(night.folder.read("_SUCCESS"))["files"] == listed


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
