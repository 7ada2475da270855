"""What a plan says of the work that is left."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from operators.divide import Track, divided
from operators.schema import DIVIDED
from operators.tracks import FRAMES, SUMMARY, sound_tracks
from pipeline.compute import Lengths
from pipeline.config import Job
from pipeline.plan import lengths, make_plan, scratch
from pipeline.store import Store

SOUND = sound_tracks(1, Job.model_fields["audio"].default)[0]
UNREAD = Track(SOUND, [(None, None)])


@pytest.mark.parametrize(
    ("modality", "assets", "expected"),
    [
        (
            "audio",
            [[Track(SOUND, [(0, 300), (300, 310)])], [Track(SOUND, [(0, 5)])]],
            (315, 105, 300),
        ),
        ("audio", [[Track(SOUND, [(0, 5)])], [UNREAD]], (5, 5, 5)),
        ("audio", [[UNREAD]], None),
        (
            "video",
            [
                [
                    Track(FRAMES, [(0, 120), (120, 200)]),
                    Track(SOUND, [(0, 200)]),
                    Track(SUMMARY, [(None, None)]),
                ]
            ],
            (200, 100, 200),
        ),
    ],
)
def test_how_long_the_spans_to_do_are(
    modality: str, assets: list[list[Track]], expected: tuple[float, float, float] | None
) -> None:
    rows = [row for number, tracks in enumerate(assets) for row in divided(str(number), tracks)]
    spans = pa.Table.from_pylist(rows, schema=DIVIDED)
    with scratch() as db:
        db.register("spans", spans)
        db.execute(f"CREATE TABLE todo AS SELECT *, '{modality}' AS modality FROM spans")
        assert lengths(db) == (None if expected is None else Lengths(*expected))


def test_pictures_have_no_length(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    fields = {"task": "caption", "input": {"uri": str(tmp_path)}, "output": {"uri": "unused"}}
    job = Job.model_validate(fields | {"model": {"id": "some/model"}})
    with scratch() as db:
        plan = make_plan(
            job, db, Store(str(tmp_path / "out"), {}), "run", lambda: None, lambda *_: None
        )
    assert plan.lengths is None
    assert plan.line() == "1 assets (0.0 MB), 1 spans, 1 to do"


def test_a_plan_says_where_answers_could_not_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,id,asked\na.jpg,1,who\na.jpg,2,where\nb.jpg,3,who\n")
    listed = {"uri": str(tmp_path / "list.csv"), "variable_columns": ["asked"], "stat": False}
    fields = {"task": "custom", "output": {"uri": "unused"}, "model": {"id": "some/model"}}
    fields |= {"prompt": {"text": "Say {asked}."}}

    def planned(**columns: str) -> str:
        job = Job.model_validate(fields | {"input": listed | columns})
        with scratch() as db:
            store = Store(str(tmp_path / "out"), {})
            return make_plan(job, db, store, "r", lambda: None, lambda *_: None).line()

    assert "3 assets" in planned()
    assert "1 files stand in several rows with other variables" in planned()
    assert "variables" not in planned(id_column="id")
