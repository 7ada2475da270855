"""The whole way with the real engine: are the answers right, and is every one there?"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from answers import go, outside, rows, same, words_right
from conftest import S3Server

from deploy.nano import films, generate_speech
from deploy.nano.generate_speech import Recording
from deploy.nano.speech_bank import Bank, record
from pipeline.verify import verify

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

# Of the nano checkpoint's words, among music and noise, and of its captions. It was trained for windows of
# up to 15 s, and is surer of short ones, as of shots of a few seconds: the way is what is tested here.
RIGHT = 0.95
# Of four such films, 96 shots, 94 are right; of this one's 26, 24.
CAPTIONS_RIGHT = 0.9
WINDOW_S = 8
SAMPLES = Path(__file__).parents[1] / "deploy" / "samples"


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
    recording = generate_speech.long_recording(bank, np.random.default_rng(5), 120.0)
    write_wav(source / "talk.wav", recording)
    write_wav(source / "silence.wav", Recording(np.zeros(16_000 * 20, np.float32), ()))
    texts = set()
    for span_s in (30, 300):
        finished = go(
            nano,
            task="transcribe",
            input={"uri": str(source)},
            output={"uri": str(tmp_path / f"out-{span_s}")},
            audio={"span_s": span_s, "window_s": WINDOW_S},
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
    said = generate_speech.answer(recording.words, "digits").split()
    # The way loses no word (tests of the cuts hold that); the nano checkpoint knows most of them.
    assert words_right(said, talk["text"].split()) >= RIGHT
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
        audio={"channel": "each", "span_s": 30, "window_s": WINDOW_S},
    )
    found = {Path(row["uri"]).name: row for row in rows(finished)}
    call = found["call.wav"]
    lines = call["text"].split("\n")
    right = 0.0
    for index, side in enumerate(sides):
        own = [one["text"] for one in call["segments"] if one["channel"] == index]
        assert " ".join(own) == lines[index] == found[f"alone-{index}.wav"]["text"]
        said = generate_speech.answer(side.words, "digits").split()
        right += words_right(said, lines[index].split()) / len(sides)
    assert right >= RIGHT
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
            audio={"span_s": max(60, span_s // 2), "window_s": WINDOW_S},
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
    said = generate_speech.answer(film.sound.words, "digits").split()
    assert words_right(said, transcript.split()) >= RIGHT
