"""Runs with the real engine, and how right their answers are."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from deploy.nano import generate_speech
from deploy.nano.generate_speech import Recording, Word
from operators.score import Edits, measure
from pipeline.config import Job
from pipeline.run import Finished, run

ENGINE = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 4096,
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
}
# A segment may begin so much after its word, or end before it.
WORD_SLACK_S = 0.3
_CLOCK = re.compile(r"(\d\d):(\d\d)")


def go(checkpoint: Path, **fields: Any) -> Finished:
    """Run a job with a small engine."""
    job = Job.model_validate({"model": {"id": str(checkpoint)}, "engine": ENGINE, **fields})
    return run(job, Console(file=io.StringIO()))


def rows(finished: Finished) -> list[dict[str, Any]]:
    """The results, a dict an asset."""
    filesystem, root = finished.folder.arrow()
    found: list[dict[str, Any]] = pq.read_table(
        f"{root}/results", filesystem=filesystem
    ).to_pylist()
    return found


def words(recording: Recording, heard: str) -> Edits:
    """Words of a transcript that are wrong, missing, or were never said."""
    said = generate_speech.answer(recording.words, "digits")
    return measure(said, heard, "basic", unspaced=False).words


def outside(said: Iterable[Word], segments: list[Mapping[str, Any]]) -> list[Word]:
    """The words that lie in no segment."""
    return [
        word
        for word in said
        if not any(
            segment["start_s"] - WORD_SLACK_S <= word.start_s
            and word.end_s <= segment["end_s"] + WORD_SLACK_S
            for segment in segments
        )
    ]


def same(told: str, caption: str) -> bool:
    """Whether a caption is right, its time within one sampling step of 1 s."""
    times = [_CLOCK.findall(text) for text in (told, caption)]
    seconds = [[60 * int(minutes) + int(rest) for minutes, rest in found] for found in times]
    return _CLOCK.sub("", told) == _CLOCK.sub("", caption) and all(
        abs(one - other) <= 1 for one, other in zip(*seconds, strict=True)
    )
