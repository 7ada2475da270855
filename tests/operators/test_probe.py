"""Probe: times, channels, and a defined outcome for every bad file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from sound import FORMATS, tone, write

from operators.errors import MediaError
from operators.probe import count_packets, probe_audio
from operators.settings import AudioSettings

SETTINGS = AudioSettings(timeout_s=60)


def code_of(path: Path) -> str:
    with pytest.raises(MediaError) as error:
        probe_audio(str(path), SETTINGS)
    assert str(path.parent) not in error.value.message
    return error.value.code


@pytest.mark.parametrize("name", FORMATS)
def test_duration_of_every_format(tmp_path: Path, name: str) -> None:
    sound = probe_audio(str(write(tmp_path / name, tone(7.3), *FORMATS[name])), SETTINGS)
    # MPEG-TS has no length but its last timestamp; the grid's slack is half a second
    assert sound.duration_s == pytest.approx(7.3, abs=0.2)
    assert sound.start_s < 0.05
    # MPEG-TS starts its clock at 1.4 s; MP3 counts the encoder's delay
    assert sound.origin_s == pytest.approx(1.4 if name == "a.ts" else 0, abs=0.05)
    assert sound.counted == (name == "a.aac")


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(2)).rename(tmp_path / "a.mp3")
    assert probe_audio(str(path), SETTINGS).duration_s == pytest.approx(2, abs=0.01)


def test_channels(tmp_path: Path) -> None:
    stereo = np.stack([tone(1), tone(1)], axis=1)
    sound = probe_audio(str(write(tmp_path / "a.wav", stereo, "-ar", "44100")), SETTINGS)
    assert sound.channels == 2


def test_the_container_may_be_longer_than_the_sound(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        source = ("-f", "lavfi", "-i", "testsrc=d=9:s=64x64:r=5")
        options = ("-map", "0:v", "-map", "1:a")
        path = _with_picture(tmp_path / name, source, options)
        assert probe_audio(str(path), SETTINGS).duration_s == pytest.approx(2, abs=0.1)


def test_sound_whose_length_no_header_says_is_counted_once_for_all_spans(tmp_path: Path) -> None:
    """FLV with pictures, whose header may be that of the pictures."""
    source = ("-f", "lavfi", "-i", "testsrc=d=3:s=64x64:r=5")
    options = ("-map", "0:v", "-map", "1:a", "-ar", "44100")
    path = _with_picture(tmp_path / "a.flv", source, options)
    before = count_packets.cache_info()
    for _ in range(3):
        sound = probe_audio(str(path), SETTINGS)
        assert sound.counted
        assert sound.duration_s == pytest.approx(2, abs=0.1)
    after = count_packets.cache_info()
    assert (after.misses, after.hits) == (before.misses + 1, before.hits + 2)
    # another file of that name is another one
    write(path, tone(1), "-vn", "-ar", "44100")
    assert probe_audio(str(path), SETTINGS).duration_s == pytest.approx(1, abs=0.1)


def test_no_sound_track(tmp_path: Path) -> None:
    source = ("-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=5")
    path = _with_picture(tmp_path / "a.mp4", source, ("-map", "0:v"))
    assert code_of(path) == "decode.no_audio"


def test_nothing_or_next_to_nothing(tmp_path: Path) -> None:
    assert code_of(write(tmp_path / "a.wav", tone(0.05))) == "decode.too_short"
    assert code_of(write(tmp_path / "b.wav", tone(0))) == "decode.too_short"
    empty = tmp_path / "c.wav"
    empty.touch()
    assert code_of(empty) == "decode.unsupported"
    assert probe_audio(str(write(tmp_path / "d.wav", tone(0.1))), SETTINGS).duration_s == 0.1


def test_damaged_and_other_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.m4a", tone(5)).read_bytes()
    cut = tmp_path / "cut.m4a"
    cut.write_bytes(whole[: len(whole) // 2])  # its index is at the end
    assert code_of(cut) == "decode.corrupt"
    noise = tmp_path / "noise.mp3"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    assert code_of(noise) in ("decode.unsupported", "decode.corrupt")
    text = tmp_path / "text.wav"
    text.write_text("not a sound\n" * 50)
    assert code_of(text) == "decode.unsupported"


def test_a_wav_that_was_cut_off_has_the_length_of_its_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(10), "-metadata", "title=a title")
    path.write_bytes(path.read_bytes()[:100_000])
    sound = probe_audio(str(path), SETTINGS)
    assert sound.duration_s == pytest.approx(10, abs=0.01)
    assert not sound.counted


def test_a_header_that_claims_years(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(2), "-ar", "8000")
    data = bytearray(path.read_bytes())
    data[21:26] = bytes([data[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])  # 2^36 - 1 samples
    path.write_bytes(data)
    assert code_of(path) == "decode.corrupt"


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_tag_of_more_digits_than_a_number_has_is_no_duration(tmp_path: Path, digits: int) -> None:
    path = tmp_path / "a.mka"
    wav = write(tmp_path / "a.wav", tone(2))
    tag = f"DURATIOX={'9' * digits}:00:00"
    # to a pipe: no header says how long it is
    command = ["ffmpeg", "-v", "error", "-i", str(wav), "-metadata:s:a:0", tag]
    done = subprocess.run([*command, "-f", "matroska", "pipe:"], capture_output=True, check=True)
    path.write_bytes(done.stdout.replace(b"DURATIOX", b"DURATION"))
    assert probe_audio(str(path), SETTINGS).duration_s == pytest.approx(2, abs=0.1)


def _with_picture(path: Path, source: tuple[str, ...], options: tuple[str, ...]) -> Path:
    wav = write(path.with_suffix(".wav"), tone(2))
    command = ["ffmpeg", "-v", "error", *source, "-i", str(wav), *options, str(path)]
    subprocess.run(command, check=True)
    return path
