"""The cache of files, as a job asks for it, and what is heard while they are measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
import ray.data
from conftest import S3Server

from operators.fetch import Ref
from operators.schema import FOUND
from pipeline.config import Job
from pipeline.divide import ROWS_A_TASK, divide_files, local_files


def test_the_limit_of_an_image_is_none_of_a_recording(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = s3.bucket() + "/a.wav"
    s3.put(uri, bytes(1000))
    fields = {"task": "transcribe", "model": {"id": "some/model"}, "output": {"uri": "out"}}
    fields |= {"input": {"uri": uri, "storage_options": s3.options}, "fetch": {"max_bytes": 999}}
    with local_files(Job.model_validate(fields))(Ref(uri, size_bytes=1000), "v1") as file:
        assert Path(file.path).stat().st_size == 1000


class InProcess:
    """What divide_files asks of Ray Data."""

    def __init__(self, blocks: list[pa.Table]) -> None:
        self._blocks = blocks

    def map_batches(self, function: Callable[[pa.Table], pa.Table], **_: object) -> InProcess:
        return InProcess([function(block) for block in self._blocks])

    def iter_batches(self, **_: object) -> Iterator[pa.Table]:
        return iter(self._blocks)


def test_measuring_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour without a word looks like a run that hangs."""
    monkeypatch.setattr(ray.data, "from_arrow", InProcess)
    gone = [
        {"asset_id": f"{number:032x}", "uri": f"{tmp_path}/{number}.wav", "version": "1"}
        for number in range(ROWS_A_TASK + 1)
    ]
    found = [row | {"fetch_uri": row["uri"], "modality": "audio"} for row in gone]
    fields = {"task": "transcribe", "model": {"id": "some/model"}, "output": {"uri": "out"}}
    job = Job.model_validate(fields | {"input": {"uri": str(tmp_path)}})
    said: list[tuple[int, str]] = []
    with duckdb.connect() as db:
        db.register("unfinished", pa.Table.from_pylist(found, schema=FOUND))
        divide_files(job, db, lambda: None, lambda number, what: said.append((number, what)))
    assert said == [(32, "of 33 files measured"), (33, "of 33 files measured")]
