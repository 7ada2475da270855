"""The cache of files, as a job asks for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from conftest import S3Server

from operators.fetch import Ref
from pipeline.config import Job
from pipeline.divide import local_files


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
