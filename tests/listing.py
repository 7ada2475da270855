"""An input as tests list it: its assets and what was passed over, or why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import InputConfig
from pipeline.source import Source
from pipeline.source_rows import SourceError


def source(uri, **given):
    return Source(InputConfig(uri=str(uri), **given), "image")


def listed(uri, **given):
    """Rows in their order, and what was skipped."""
    asked = source(uri, **given)
    rows = [row for batch in asked.batches() for row in batch.to_pylist()]
    return rows, dict(asked.skipped)


def found(uri, **given):
    """URIs in their order, and what was skipped."""
    rows, skipped = listed(uri, **given)
    return [row["uri"] for row in rows], skipped


def refused(uri, **given):
    with pytest.raises(SourceError) as caught:
        listed(uri, **given)
    return str(caught.value)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
