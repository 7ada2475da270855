"""A job file that several of these tests hand in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def bucket_job(tmp_path: Path) -> Path:
    """A job that is all URIs, so that it may go to a cluster; under a name that it loses there."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{task: caption, input: {uri: s3://b/i}, output: {uri: s3://b/o}, model: {id: a/b}}"
    )
    return file
