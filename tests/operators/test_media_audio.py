"""The audio stage: the same windows at every span size, no word cut or lost, every row kept."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import wave
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import PROMPT
from sound import FORMATS, RATE_HZ, Spoken, spoken, tone, write

from operators.errors import MediaError
from operators.fetch import FetchError, Ref
from operators.frames import FRAME_SAMPLES
from operators.local_files import LocalFile
from operators.media_audio import PrepareSpeech, Read, missing
from operators.media_files import FileMedia
from operators.probe import probe_audio
from operators.prompt import Prompt
from operators.schema import PAYLOAD, PLAN, PREPARED
from operators.settings import AudioSettings
from operators.windows import grid, spans

AUDIO = AudioSettings(timeout_s=60)
# 1000 take 200 s, and agree as well.
LENGTHS = 100
# A block, 303 s, and a part of the next.
LONG_S = 340.0


class Files:
    """Local paths as they are; a path in `failing` raises."""

    def __init__(self, failing: dict[str, MediaError] | None = None) -> None:
        self.failing = failing or {}

    def __call__(self, ref: Ref, version: str | None) -> AbstractContextManager[LocalFile]:
        if ref.uri in self.failing:
            raise self.failing[ref.uri]
        return nullcontext(LocalFile(ref.uri, 1))


def stage(
    audio: AudioSettings = AUDIO, files: Files | None = None, prompt: Prompt = PROMPT
) -> FileMedia:
    return FileMedia(files or Files(), {"audio": PrepareSpeech(audio, prompt)})


def plan(path: Path, audio: AudioSettings = AUDIO, track: str = "mix") -> pa.Table:
    try:
        nominal = spans(probe_audio(str(path), audio).duration_s, audio)
    except MediaError:
        nominal = [(0.0, 0.0)]
    return pa.Table.from_pylist(
        [
            {
                "span_id": f"{path.name}-{index}",
                "track": track,
                "track_index": index,
                "track_count": len(nominal),
                "span_start_s": start_s,
                "span_end_s": end_s,
                "fetch_uri": str(path),
                "uri": path.name,
            }
            for index, (start_s, end_s) in enumerate(nominal)
        ],
        schema=PLAN,
    )


def run(path: Path, audio: AudioSettings = AUDIO, files: Files | None = None) -> list[dict]:
    table = stage(audio, files)(plan(path, audio))
    assert table.schema == PREPARED
    table.validate(full=True)
    return table.to_pylist()


def windows(rows: list[dict]) -> list[tuple[float, float, str, int]]:
    columns = ("window_start_s", "window_end_s", "window_media_hash", "window_columns")
    return [window for row in rows for window in zip(*(row[name] for name in columns), strict=True)]


@pytest.fixture(scope="module")
def recording() -> Spoken:
    return spoken(LONG_S, seed=5)


@pytest.mark.parametrize("name", ["a.wav", "vbr.mp3", "a.webm", "aac.mkv"])
def test_the_same_windows_at_every_span_size(tmp_path: Path, recording: Spoken, name: str) -> None:
    path = write(tmp_path / name, recording.samples, *FORMATS[name])
    sizes = (30, 300) if name == "aac.mkv" else (120, 300)
    found = []
    for span_s in sizes:
        rows = run(path, AudioSettings(span_s=span_s, timeout_s=60))
        assert [row["error_message"] for row in rows] == [None] * len(rows)
        found.append(windows(rows))
    assert all(other == found[0] for other in found)
    assert 31 <= len(found[0]) <= 36
    # no window overlaps the next, and each word lies in exactly one
    for left, right in zip(found[0], found[0][1:], strict=False):
        assert left[1] <= right[0]
    for text, start_s, end_s in recording.words:
        middle_s = (start_s + end_s) / 2
        holding = [w for w in found[0] if w[0] <= middle_s <= w[1]]
        assert len(holding) == 1, (text, start_s)
        # 64 ms: the delay of the codecs whose container does not note it down
        assert holding[0][0] - 0.07 <= start_s, (text, start_s, holding)
        assert end_s <= holding[0][1] + 0.07, (text, end_s, holding)


@pytest.mark.parametrize("window_s", [10.0, 28.0])
def test_other_window_lengths(tmp_path: Path, window_s: float) -> None:
    said = spoken(130, seed=2)
    path = write(tmp_path / "a.wav", said.samples)
    found = [
        windows(run(path, AudioSettings(window_s=window_s, span_s=span_s))) for span_s in (30, 300)
    ]
    assert found[0] == found[1]
    assert all(end - start <= window_s for start, end, _, _ in found[0])
    assert max(end - start for start, end, _, _ in found[0]) > 0.6 * window_s
    for _, start_s, end_s in said.words:
        assert any(w[0] <= start_s and end_s <= w[1] for w in found[0])


def test_a_row(tmp_path: Path) -> None:
    said = spoken(20, seed=1)
    (row,) = run(write(tmp_path / "a.wav", said.samples, "-c:a", "pcm_f32le"))
    assert row["duration_s"] == 20
    assert (row["error_code"], row["error_message"], row["attempts"]) == (None, None, 1)
    assert row["decode_s"] > 0
    assert row["prepare_s"] > 0
    assert len(row["window_media"]) == 2
    for start_s, end_s, media, columns, rows, tokens in zip(
        *(row[f"window_{name}"] for name in ("start_s", "end_s", "media", "columns", "rows")),
        row["window_tokens"],
        strict=True,
    ):
        assert rows == 1
        assert tokens == PROMPT.window(columns)
        framed = np.frombuffer(media, np.float32).reshape(columns, FRAME_SAMPLES)
        start, end = round(start_s * RATE_HZ), round(end_s * RATE_HZ)
        assert 0 <= columns * FRAME_SAMPLES - (end - start) < FRAME_SAMPLES
        flat, said_there = framed.reshape(-1)[: end - start], said.samples[start:end]
        spoken_there = flat != 0
        assert np.array_equal(flat[spoken_there], said_there[spoken_there])
        assert flat[:100].any()


@pytest.mark.parametrize("name", ["silence", "noise", "tone"])
def test_nobody_speaks_no_window(tmp_path: Path, name: str) -> None:
    sound = {
        "silence": np.zeros(40 * RATE_HZ, np.float32),
        "noise": np.random.default_rng(0).normal(0, 0.1, 40 * RATE_HZ).astype(np.float32),
        "tone": tone(40),
    }[name]
    (row,) = run(write(tmp_path / "a.flac", sound))
    assert row["error_code"] is None
    assert row["duration_s"] == 40
    assert all(row[name] == [] for name in (*PAYLOAD, "window_start_s", "window_end_s"))


def test_bad_files_cost_their_own_rows(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", spoken(5).samples)
    text = tmp_path / "text.mp3"
    text.write_text("not a sound\n" * 50)
    short = write(tmp_path / "short.wav", tone(0.05))
    gone = tmp_path / "gone.wav"
    table = pa.concat_tables([plan(path) for path in (good, text, short, gone, good)])
    files = Files({str(gone): FetchError("fetch.not_found", "gone", 3)})
    rows = stage(files=files)(table).to_pylist()
    assert [row["error_code"] for row in rows] == [
        None,
        "decode.unsupported",
        "decode.too_short",
        "fetch.not_found",
        None,
    ]
    assert rows[3]["attempts"] == 3
    for row in rows:
        failed = row["error_code"] is not None
        assert all((row[name] is None) == failed for name in (*PAYLOAD, "window_start_s"))
        assert row["fetch_s"] is not None
    assert rows[0]["window_media"] == rows[4]["window_media"]


def test_a_file_that_ends_early_keeps_what_it_has(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp3", spoken(200, seed=4).samples, "-b:a", "64k")
    cut = tmp_path / "cut.mp3"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 5])  # its header still says 200 s
    audio = AudioSettings(span_s=60, timeout_s=60)
    rows = run(cut, audio)
    assert [row["error_code"] for row in rows] == [None, None, "decode.corrupt", "decode.corrupt"]
    assert rows[0]["error_message"] is None
    assert rows[1]["error_stage"] == "decode"
    assert "no sound from 80" in rows[1]["error_message"]
    assert windows(rows[:1]) == windows(run(whole, audio)[:1])
    assert max(rows[1]["window_end_s"]) <= 80.1


def test_a_second_and_a_half_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", spoken(40, seed=3).samples)
    path.write_bytes(path.read_bytes()[: -RATE_HZ * 3 // 2 * 2])
    (row,) = run(path)
    assert row["error_message"].startswith("no sound from 38.5 s to 40.0 s: ")


def test_frames_that_cannot_be_decoded_leave_the_others_at_their_times(tmp_path: Path) -> None:
    said = spoken(40, seed=3)
    path = write(tmp_path / "a.aac", said.samples, "-ar", "44100")
    data, noise = bytearray(path.read_bytes()), np.random.default_rng(1)
    at = number = 0
    while at + 7 < len(data):  # ADTS: 13 bits of a header are the frame's length, 1024 samples
        length = (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
        if 12 <= number * 1024 / 44100 < 20:
            data[at + 7 : at + length] = noise.bytes(length - 7)
        at, number = at + length, number + 1
    path.write_bytes(data)
    (row,) = run(path)
    assert "no sound from 12" in row["error_message"]
    kept = [word for word in said.words if word[2] < 11 or word[1] > 22]
    assert len(kept) > 15
    for _, start_s, end_s in kept:
        assert any(w[0] - 0.1 <= start_s and end_s <= w[1] + 0.1 for w in windows([row]))


def test_what_ffmpeg_says_of_pictures_is_no_damage_of_the_sound(tmp_path: Path) -> None:
    """A broadcast that was tuned in between key frames, and a pause that no packet fills."""
    said = spoken(30, seed=3).samples
    film = tmp_path / "whole.ts"
    pictures = ["-f", "lavfi", "-i", "testsrc=s=160x120:r=25:d=30"]
    sound = ["-i", str(write(tmp_path / "a.wav", said)), "-af", "aselect='not(between(t,15,21))'"]
    coded = ["-c:v", "libx264", "-g", "100", "-c:a", "aac", str(film)]
    subprocess.run(["ffmpeg", "-v", "error", *pictures, *sound, *coded], check=True)
    data = film.read_bytes()
    start = len(data) // 188 // 10 * 188
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[start:])
    (row,) = run(cut)
    assert row["error_message"] is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.m4a", ("-c:a", "aac", "-b:a", "48k", "-movflags", "+faststart")),
        ("a.flac", ()),
        ("a.wma", ("-c:a", "wmav2")),
    ],
)
def test_damage_inside_of_a_file_is_named(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    """A fifth of the bytes is zero; the rest is kept, at its time."""
    said = spoken(60, seed=1)
    path = write(tmp_path / name, said.samples, *options)
    data = bytearray(path.read_bytes())
    first, last = len(data) * 2 // 5, len(data) * 3 // 5
    data[first:last] = bytes(last - first)
    path.write_bytes(data)
    (row,) = run(path)
    assert (row["error_code"], row["error_stage"]) == (None, "decode")
    assert re.match(r"no sound from 2[345]\.\d s to 3[567]\.\d s: the file", row["error_message"])
    kept = [word for word in said.words if word[2] < 22 or word[1] > 38]
    assert len(kept) > 20
    for _, start_s, end_s in kept:
        assert any(w[0] - 0.07 <= start_s and end_s <= w[1] + 0.07 for w in windows([row]))


def test_a_decoder_that_dies_in_a_block_costs_the_rest_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recording: Spoken
) -> None:
    """It gave 100 s of the first 303 s; the next block is whole."""
    path = write(tmp_path / "a.wav", recording.samples)
    whole = run(path, AudioSettings(span_s=600, timeout_s=60))
    real = shutil.which("ffmpeg")
    dying = tmp_path / "bin" / "ffmpeg"
    dying.parent.mkdir()
    dying.write_text(
        f"""#!/bin/sh
case "$*" in
    *"-ss 0.000000"*) {real} "$@" | head -c {100 * 4 * RATE_HZ}; kill -SEGV $$ ;;
    *) exec {real} "$@" ;;
esac
"""
    )
    dying.chmod(0o755)
    monkeypatch.setenv("PATH", str(dying.parent), prepend=":")
    (row,) = run(path, AudioSettings(span_s=600, timeout_s=60))
    assert re.match(r"no sound from 100\.0 s to 29\d\.\d s: the file", row["error_message"])
    before, after = windows([row]), windows(whole)
    assert [w for w in before if w[1] < 90] == [w for w in after if w[1] < 90]
    assert [w for w in before if w[0] > 310] == [w for w in after if w[0] > 310]
    assert not [w for w in before if w[0] > 101 and w[1] < 290]


@pytest.mark.parametrize("hours", [0.01, 4.2])
def test_what_is_missing_or_too_much_does_not_depend_on_the_length(
    tmp_path: Path, hours: float
) -> None:
    sound = probe_audio(str(write(tmp_path / "a.wav", tone(1))), AUDIO)
    sound = replace(sound, duration_s=hours * 3600)
    found = grid(sound.duration_s, AUDIO)
    end = round(sound.duration_s * RATE_HZ)

    def message(last: int, heard: int) -> str | None:
        gap = missing(Read({}, last, []), heard, sound, found, found.spans - 1)
        return gap and gap.message

    assert message(end, end) is None
    assert message(end - RATE_HZ // 2, end - RATE_HZ // 2) is None
    assert "no sound from" in (message(end - 2 * RATE_HZ, end - 2 * RATE_HZ) or "")
    reached = found.tile(found.windows)[1]
    assert "goes on behind" in (message(reached, reached) or "")
    assert "goes on behind" in (message(end + RATE_HZ, end + RATE_HZ // 2) or "")


def test_a_plan_of_another_file_and_a_prompt_without_room(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", spoken(20).samples)
    (row,) = plan(path).to_pylist()
    for other in ({"track_index": 3, "track_count": 7}, {"span_start_s": None}):
        table = pa.Table.from_pylist([row | other], schema=PLAN)
        assert stage()(table).to_pylist()[0]["error_code"] == "fetch.changed"
    tight = replace(PROMPT, max_tokens=100)
    rows = stage(prompt=tight)(plan(path)).to_pylist()
    assert rows[0]["error_code"] == "prepare.too_long"


def test_no_rows_pickles_and_no_torch() -> None:
    media = pickle.loads(pickle.dumps(stage()))
    assert media(PLAN.empty_table()).equals(PREPARED.empty_table())


def test_a_late_start_and_a_hole_are_at_their_true_times(tmp_path: Path) -> None:
    said = spoken(30, seed=6)
    late = ("-itsoffset", "100")
    path = write(tmp_path / "a.mkv", said.samples, "-c:a", "libopus", before=late)
    (row,) = run(path)
    assert row["duration_s"] == pytest.approx(130, abs=0.1)
    for _, start_s, end_s in said.words:
        assert any(
            start - 0.07 <= start_s + 100 and end_s + 100 <= end + 0.07
            for start, end, _, _ in windows([row])
        )


def test_frames_placeholders_and_durations_agree_at_random_lengths_and_rates(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(17)
    sound = spoken(30, seed=3, gaps_s=(0.1, 0.2)).samples
    drawn = {}
    for index in range(LENGTHS):
        rate = int(draw.integers(4_000, 96_001))
        count = max(rate // 10 + 1, int(rate * np.exp(draw.uniform(np.log(0.1), np.log(20)))))
        places = np.arange(count) * RATE_HZ / rate
        played = np.interp(places, np.arange(len(sound)), sound)
        path = tmp_path / f"{index}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((played * 32767).astype("<i2").tobytes())
        drawn[path.name] = count / rate
    table = pa.concat_tables(plan(tmp_path / name) for name in drawn)
    rows = stage()(table).to_pylist()
    assert len(rows) == len(drawn)
    heard = 0
    for row, duration_s in zip(rows, drawn.values(), strict=True):
        assert row["error_message"] is None
        # an entry of the time line is a sample of 16 kHz
        assert row["duration_s"] == pytest.approx(duration_s, abs=1 / RATE_HZ)
        columns = ("start_s", "end_s", "columns", "tokens", "media")
        for start_s, end_s, count, ids, media in zip(
            *(row[f"window_{name}"] for name in columns), strict=True
        ):
            heard += 1
            assert count == -(-round((end_s - start_s) * RATE_HZ) // FRAME_SAMPLES)
            assert ids.count(PROMPT.media_id) == count
            assert len(media) == count * FRAME_SAMPLES * 4
            assert 0 <= start_s < end_s <= duration_s + 1 / RATE_HZ
    assert heard > LENGTHS / 2
