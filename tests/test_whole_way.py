"""The whole way with the real engine: are the answers right, and is every one there?"""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from answers import go, outside, rows, same, words
from conftest import S3Server
from rich.console import Console

from deploy.nano import films, generate_speech
from deploy.nano.generate_speech import Recording
from deploy.nano.speech_bank import Bank, record
from operators.score import Edits
from pipeline.job_file import load_job
from pipeline.run import run
from pipeline.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

# Word errors of the nano checkpoint, words never said included, and its captions. It is surer of shots of a
# few seconds than of long ones: the way is what is tested here.
WRONG = 0.05
# Of four such films, 96 shots, 94 are right; of this one's 26, 24.
CAPTIONS_RIGHT = 0.9
ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "deploy" / "samples"


def test_the_samples_get_their_captions_from_bucket_to_bucket(nano: Path, s3: S3Server) -> None:
    expected = {}
    bucket = s3.bucket()
    for line in (SAMPLES / "expected.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["preset"] == "caption-dense":
            name = Path(entry["file"]).name
            expected[name] = entry["answer"]
            s3.put(f"{bucket}/raw/{name}", (SAMPLES / entry["file"]).read_bytes())
    s3.put(f"{bucket}/raw/broken.jpg", b"no picture")
    assert len(expected) >= 6
    options = {"storage_options": s3.options}
    finished = go(
        nano,
        task="caption",
        input={"uri": f"{bucket}/raw/", **options},
        output={"uri": f"{bucket}/captions/", **options},
        prompt={"preset": "caption-dense"},
    )
    found = {row["uri"].rpartition("/")[2]: row for row in rows(finished)}
    assert found.pop("broken.jpg")["error_code"] == "decode.unsupported"
    assert {name: row["text"] for name, row in found.items()} == expected
    assert verify(f"{bucket}/captions/", s3.options)[0] == []
    report = json.loads(finished.folder.read("report.json"))
    assert report["tokens"]["media_tokens"] == sum(row["media_tokens"] for row in found.values())
    assert 0 <= report["engine"]["waiting_share"] <= 1


@pytest.mark.parametrize("example", ["demo-speech", "demo-video"])
def test_the_demo_gives_the_samples_their_answers(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the examples name files from there
    job = load_job(f"jobs/examples/{example}.yaml", [f"output.uri={tmp_path}"])
    found = {}
    for row in rows(run(job, Console(file=io.StringIO()))):
        file = row["uri"].partition("deploy/samples/")[2]
        if job.modality == "video":
            found[file, "video-describe"] = row["text"]
        found[file, "asr-original"] = row["transcript"] or row["text"]
    expected = {}
    for line in (SAMPLES / "expected.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if (entry["file"], entry["preset"]) in found:
            expected[entry["file"], entry["preset"]] = entry["answer"]
    assert found == expected != {}


def write_wav(path: Path, *channels: Recording) -> None:
    longest = max(len(channel.samples) for channel in channels)
    sound = np.zeros((longest, len(channels)), np.int16)
    for index, channel in enumerate(channels):
        sound[: len(channel.samples), index] = (channel.samples * 32767).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(sound.tobytes())


@pytest.fixture(scope="module")
def bank() -> Bank:
    return record(seed=4711, per_voice=1)


def test_a_recording_gives_its_words_with_their_times_whatever_the_spans(
    nano: Path, bank: Bank, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    recording = generate_speech.long_recording(
        bank, np.random.default_rng(5), 120.0, between=generate_speech.WITH_MUSIC
    )
    write_wav(source / "talk.wav", recording)
    write_wav(source / "silence.wav", Recording(np.zeros(16_000 * 20, np.float32), ()))
    texts = set()
    for span_s in (30, 300):
        finished = go(
            nano,
            task="transcribe",
            input={"uri": str(source)},
            output={"uri": str(tmp_path / f"out-{span_s}")},
            audio={"span_s": span_s},
        )
        found = {Path(row["uri"]).name: row for row in rows(finished)}
        assert (found["silence.wav"]["status"], found["silence.wav"]["text"]) == ("empty", "")
        talk = found["talk.wav"]
        assert talk["status"] == "ok"
        texts.add(talk["text"])
        spans = finished.accounts["spans"]
        assert spans["planned"] == spans["ok"] + spans["empty"]
    assert spans["planned"] == 2
    assert len(texts) == 1
    # The way loses no word (tests of the cuts hold that); the nano checkpoint knows most of them, and hears
    # words in the rests of music beside them.
    edits = words(recording, talk["text"])
    assert edits.errors - edits.insertions <= WRONG * edits.reference
    assert outside(recording.words, talk["segments"]) == []
    subtitles = finished.folder.names("subtitles")
    assert [name.rpartition(".")[2] for name in subtitles] == ["json", "srt", "vtt"]
    assert finished.folder.read(subtitles[2]).startswith(b"WEBVTT")
    assert json.loads(finished.folder.read(subtitles[0]))["text"] == talk["text"]


def test_each_channel_is_a_transcript_of_its_own(nano: Path, bank: Bank, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    sides = [
        generate_speech.long_recording(bank, np.random.default_rng(seed), 40.0) for seed in (8, 9)
    ]
    write_wav(source / "call.wav", *sides)
    for index, side in enumerate(sides):
        write_wav(source / f"alone-{index}.wav", side)
    finished = go(
        nano,
        task="transcribe",
        input={"uri": str(source)},
        output={"uri": str(tmp_path / "out")},
        audio={"channel": "each", "span_s": 30},
    )
    found = {Path(row["uri"]).name: row for row in rows(finished)}
    call = found["call.wav"]
    lines = call["text"].split("\n")
    edits = Edits()
    for index, side in enumerate(sides):
        own = [one["text"] for one in call["segments"] if one["channel"] == index]
        assert " ".join(own) == lines[index] == found[f"alone-{index}.wav"]["text"]
        edits += words(side, lines[index])
    assert edits.rate <= WRONG
    assert [one["start_s"] for one in call["segments"]] == sorted(
        one["start_s"] for one in call["segments"]
    )
    names = finished.folder.names("subtitles")
    assert sorted(name.split(".", 1)[1] for name in names) == [
        *("c0.srt", "c0.srt", "c0.srt", "c0.vtt", "c0.vtt", "c0.vtt"),
        *("c1.srt", "c1.vtt", "json", "json", "json"),
    ]
    spans = finished.accounts["spans"]
    assert spans["planned"] == spans["ok"] + spans["empty"] == 8


def test_a_film_gives_its_captions_and_words_whatever_the_spans(
    nano: Path, bank: Bank, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rng = np.random.default_rng(21)
    film = films.draw_film(rng, bank, [int(length) for length in rng.integers(5, 7, 26)])
    films.write(film, source / "film.mp4")
    found, planned = [], []
    for span_s in (120, 600):
        finished = go(
            nano,
            task="describe-video",
            input={"uri": str(source)},
            output={"uri": str(tmp_path / f"out-{span_s}")},
            video={"transcribe": True, "span_s": span_s},
            audio={"span_s": max(60, span_s // 2)},
        )
        (row,) = rows(finished)
        assert row["status"] == "ok"
        planned.append(finished.accounts["spans"]["planned"])
        found.append((row["segments"], row["transcript"], row["transcript_segments"]))
    assert planned[0] > planned[1] == 2
    assert found[0] == found[1]
    segments, transcript, _ = found[0]
    assert len(segments) == len(film.shots)
    right = 0
    for segment, shot in zip(segments, film.shots, strict=True):
        assert segment["start_s"] == pytest.approx(shot.start_s, abs=0.15)
        right += same(segment["text"], films.caption(shot))
    assert right >= CAPTIONS_RIGHT * len(film.shots)
    assert words(film.sound, transcript).rate <= WRONG
