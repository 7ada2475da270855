"""Videos through Ray Data with an engine that echoes: captions, transcript and summary of one asset."""

from __future__ import annotations

import io
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import EchoEngine
from rich.console import Console
from sound import spoken, write

from pipeline.config import Job
from pipeline.run import Finished, run
from pipeline.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

COLOURS = ("red", "blue", "green", "white")
SHOT_S = 12


def film(path: Path, *, shots: int = 3, sound: bool = True, channels: int = 1) -> Path:
    """Shots of a plain colour, 12 s each, and somebody speaking."""
    sources = [f"color={colour}:s=96x64:r=10:d={SHOT_S}" for colour in COLOURS[:shots]]
    inputs = [part for source in sources for part in ("-f", "lavfi", "-i", source)]
    graph = "".join(f"[{index}:v]" for index in range(shots)) + f"concat=n={shots}[v]"
    options = ["-map", "[v]", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "50"]
    if sound:
        said = spoken(shots * SHOT_S, seed=3).samples
        if channels == 2:
            said = np.stack([said, np.zeros_like(said)], axis=1)
        talk = write(path.parent / f"{path.stem}.wav", said)
        inputs += ["-i", str(talk)]
        options += ["-map", f"{shots}:a", "-c:a", "aac"]
    command = ["ffmpeg", "-v", "error", "-y", *inputs, "-filter_complex", graph, *options]
    subprocess.run([*command, str(path)], check=True)
    for wav in path.parent.glob("*.wav"):
        wav.unlink()
    return path


def go(nano: Path, source: Path, target: Path, **sections: Any) -> tuple[Finished, str]:
    fields: dict[str, Any] = {
        "task": "describe-video",
        "input": {"uri": str(source)},
        "output": {"uri": str(target)},
        "model": {"id": str(nano)},
        "engine": {"max_num_seqs": 8},
    }
    said = io.StringIO()
    finished = run(
        Job.model_validate(fields | sections),
        Console(file=said, width=200),
        engine=lambda job: partial(EchoEngine),
    )
    return finished, said.getvalue()


def rows(finished: Finished) -> dict[str, dict[str, Any]]:
    found = pq.read_table(finished.folder.url("results")).to_pylist()
    return {Path(row["uri"]).name: row for row in found}


def test_captions_transcript_and_summary_of_one_asset(nano: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    film(source / "talk.mp4")
    film(source / "mute.mkv", sound=False)
    (source / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 no more than that")
    target = tmp_path / "out"
    video = {"transcribe": True, "summary": True, "span_s": 30}
    finished, said = go(nano, source, target, video=video, audio={"span_s": 30})
    found = rows(finished)
    assert {name: row["status"] for name, row in found.items()} == {
        "talk.mp4": "ok",
        "mute.mkv": "ok",
        "broken.mp4": "failed",
    }
    talk, mute = found["talk.mp4"], found["mute.mkv"]
    shots = [(round(one["start_s"]), round(one["end_s"])) for one in talk["segments"]]
    assert shots == [(0, 12), (12, 24), (24, 36)]
    assert [one["text"] for one in talk["segments"]] == ["12 frames"] * 3
    assert talk["text"] == mute["text"] == "told"
    assert talk["transcript"].endswith("seconds")
    assert " ".join(one["text"] for one in talk["transcript_segments"]) == talk["transcript"]
    assert (mute["transcript"], mute["transcript_segments"]) == (None, None)
    assert (talk["modality"], talk["width_px"], talk["height_px"]) == ("video", 96, 64)
    assert 35.9 < talk["duration_s"] < 36.2
    spans = finished.accounts["spans"]
    # talk: 1 of frames, 2 of sound, 1 summary; mute: 1 and 1; broken: 1
    assert spans["planned"] == 7
    assert (spans["ok"], spans["failed"]) == (6, 1)
    names = sorted(name.rpartition("/")[2] for name in finished.folder.names("subtitles"))
    assert sorted(name.split(".", 1)[1] for name in names) == [
        "chapters.vtt",
        "chapters.vtt",
        "json",
        "json",
        "srt",
        "vtt",
    ]
    (chapters,) = (name for name in names if name.startswith("talk") and "chapters" in name)
    assert (
        "00:00:12.000 --> 00:00:24.000\n12 frames\n"
        in finished.folder.read(f"subtitles/{chapters}").decode()
    )
    assert verify(str(target), {})[0] == []
    again, said = go(nano, source, target, video=video, audio={"span_s": 30})
    assert not again.did_work, said


def test_segments_are_the_same_whatever_the_spans(nano: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    film(source / "film.mp4", shots=4, sound=False)
    found, planned = [], []
    for span_s in (30, 300):
        video = {"span_s": span_s, "max_s": 8}
        finished, _ = go(nano, source, tmp_path / f"out-{span_s}", video=video)
        found.append(rows(finished)["film.mp4"]["segments"])
        planned.append(finished.accounts["spans"]["planned"])
    assert found[0] == found[1]
    assert planned == [2, 1]
    borders = [round(one["start_s"], 1) for one in found[0]]
    assert borders == [0, 6, 12, 18, 24, 32, 36, 42]


def test_sound_and_pictures_fail_on_their_own(nano: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write(source / "only-sound.mp4", spoken(20, seed=1).samples, "-c:a", "aac")
    finished, _ = go(nano, source, tmp_path / "out", video={"transcribe": True})
    row = rows(finished)["only-sound.mp4"]
    assert (row["status"], row["error_code"]) == ("partial", "decode.no_video")
    assert row["transcript"].endswith("seconds")
    assert row["text"] in (None, "")
    (failed,) = pq.read_table(finished.folder.url("failures")).to_pylist()
    assert (failed["track"], failed["error_code"]) == ("frames", "decode.no_video")


def test_a_summary_is_told_again_when_a_failed_span_is(nano: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write(source / "only-sound.mp4", spoken(20, seed=1).samples, "-c:a", "aac")
    video = {"transcribe": True, "summary": True}
    first, _ = go(nano, source, tmp_path / "out", video=video)
    assert rows(first)["only-sound.mp4"]["text"] == "told"
    again, said = go(nano, source, tmp_path / "out", video=video, limits={"retry_failed": True})
    assert again.accounts["done_now"] == 2, said
    assert rows(again)["only-sound.mp4"]["status"] == "partial"


def test_each_channel_of_a_video_is_a_transcript_of_its_own(nano: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    film(source / "call.mp4", channels=2)
    finished, _ = go(
        nano,
        source,
        tmp_path / "out",
        video={"transcribe": True, "segment": "fixed"},
        audio={"channel": "each"},
    )
    row = rows(finished)["call.mp4"]
    assert {one["channel"] for one in row["transcript_segments"]} == {0}
    assert row["status"] == "ok"
    assert finished.accounts["spans"]["planned"] == 3
    assert [(one["start_s"], round(one["end_s"])) for one in row["segments"]] == [(0, 30), (30, 36)]
