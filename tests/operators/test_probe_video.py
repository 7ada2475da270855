"""Probe: what is known of a video before anything is decoded, and a code for what is none."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media import encode, photo
from sound import tone, write
from video import FORMATS, X264, numbered_video, write_video

from operators.errors import MediaError
from operators.probe_video import probe_video
from operators.settings import VideoSettings

SETTINGS = VideoSettings(timeout_s=60)


def code_of(path: Path) -> str:
    with pytest.raises(MediaError) as error:
        probe_video(str(path), SETTINGS)
    assert str(path.parent) not in error.value.message
    return error.value.code


def test_plain_facts(tmp_path: Path) -> None:
    facts = probe_video(str(numbered_video(tmp_path / "a.mp4", 50, *X264)), SETTINGS)
    assert (facts.codec, facts.width, facts.height, facts.rotation) == ("h264", 192, 144, 0)
    assert facts.display_size == (192, 144)
    assert (facts.pixel_aspect, facts.bit_depth, facts.hdr) == (Fraction(1), 8, False)
    assert (facts.average_fps, facts.nominal_fps, facts.frame_s) == (25, 25, 0.04)
    assert (facts.start_s, facts.duration_s, facts.origin_s) == (0, 2, 0)
    assert not facts.counted
    assert facts.interlaced is False


def test_a_cover_is_not_a_video(tmp_path: Path) -> None:
    sound = write(tmp_path / "a.mp3", tone(2))
    cover = tmp_path / "cover.png"
    cover.write_bytes(encode(photo(64, 64), "PNG"))
    for name in ("b.mp3", "b.m4a"):
        path = tmp_path / name
        subprocess.run(
            [
                *("ffmpeg", "-v", "error", "-i", str(sound), "-i", str(cover), "-map", "0:a"),
                *("-map", "1:v", "-c:v", "copy", "-disposition:v", "attached_pic", str(path)),
            ],
            check=True,
        )
        assert code_of(path) == "decode.no_video"


def test_a_cover_beside_a_video(tmp_path: Path) -> None:
    plain = numbered_video(tmp_path / "plain.mp4", 50, *X264)
    cover = tmp_path / "cover.png"
    cover.write_bytes(encode(photo(64, 64), "PNG"))
    path = tmp_path / "a.mp4"
    subprocess.run(
        [
            *(
                "ffmpeg",
                "-v",
                "error",
                "-i",
                str(cover),
                "-i",
                str(plain),
                "-map",
                "0",
                "-map",
                "1",
            ),
            *("-c", "copy", "-disposition:v:0", "attached_pic", str(path)),
        ],
        check=True,
    )
    facts = probe_video(str(path), SETTINGS)
    assert (facts.codec, facts.width) == ("h264", 192)


def test_sound_only(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.wav"):
        assert code_of(write(tmp_path / name, tone(1))) == "decode.no_video"


def test_no_length_in_the_header(tmp_path: Path) -> None:
    """As a browser records: Matroska to a pipe."""
    path = tmp_path / "a.webm"
    plain = numbered_video(tmp_path / "plain.webm", 60, *FORMATS["vp8.webm"])
    # Matroska's own tag would tell
    bare = ("-c", "copy", "-map_metadata:s", "-1", "-f", "webm")
    with path.open("wb") as file:
        subprocess.run(
            ["ffmpeg", "-v", "error", "-i", str(plain), *bare, "pipe:"],
            stdout=file,
            check=True,
        )
    facts = probe_video(str(path), SETTINGS)
    assert facts.counted
    assert facts.duration_s == pytest.approx(2.4, abs=0.05)


def test_sound_longer_than_the_pictures(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.ts"):
        path = tmp_path / name
        plain = numbered_video(tmp_path / "plain.mp4", 50, *X264)
        sound = ("-f", "lavfi", "-i", "sine=d=6")
        subprocess.run(
            ["ffmpeg", "-v", "error", "-i", str(plain), *sound, "-c:v", "copy", str(path)],
            check=True,
        )
        facts = probe_video(str(path), SETTINGS)
        assert facts.duration_s == pytest.approx(2, abs=0.1), name


def test_a_packet_with_a_damaged_time_is_no_new_clock(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.ts", 100, *X264, "-g", "25")
    data = bytearray(path.read_bytes())
    packet = 0
    for _ in range(50):
        packet = data.index(b"\x00\x00\x01\xe0", packet + 4)
    # hours of the times of showing and of decoding
    data[packet + 9] |= 0x0C
    data[packet + 14] |= 0x0C
    path.write_bytes(data)
    facts = probe_video(str(path), SETTINGS)
    assert facts.clock_bytes is None
    assert facts.duration_s == pytest.approx(4, abs=0.1)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(data + data[: len(data) // 2])
    facts = probe_video(str(joined), SETTINGS)
    assert facts.clock_bytes == pytest.approx(len(data), abs=4 * 188)
    assert facts.duration_s == pytest.approx(4, abs=0.1)


def test_pictures_of_too_many_pixels(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mp4", [np.zeros((96, 64, 3), np.uint8)], *X264, "-vf", "setsar=2"
    )
    # as they are shown: a wide pixel is two
    assert probe_video(str(path), VideoSettings(max_pixels=128 * 96)).width == 64
    with pytest.raises(MediaError) as error:
        probe_video(str(path), VideoSettings(max_pixels=128 * 96 - 1))
    assert error.value.code == "decode.too_large"
    assert error.value.message == "128x96 is 12288 pixels; video.max_pixels is 12287"


def test_what_is_no_video(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 50)
    # the name decides which reader refuses it
    for path in (empty, text):
        assert code_of(path) in ("decode.unsupported", "decode.corrupt")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    assert code_of(noise) in ("decode.unsupported", "decode.corrupt", "decode.no_video")
    playlist = tmp_path / "a.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{text}\n")
    assert code_of(playlist) == "decode.unsupported"


def test_a_header_without_its_index(tmp_path: Path) -> None:
    """The moov atom is at the end, and the end is missing."""
    path = numbered_video(tmp_path / "a.mp4", 50, *X264)
    path.write_bytes(path.read_bytes()[:-3000])
    assert code_of(path) == "decode.corrupt"


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mkv", 25, *X264).rename(tmp_path / "a.avi")
    assert probe_video(str(path), SETTINGS).duration_s == pytest.approx(1, abs=0.01)


def test_pixels_of_an_absurd_shape_are_taken_for_square(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", 5, *X264, "-vf", "setsar=1/50")
    assert probe_video(str(path), SETTINGS).display_size == (192, 144)
