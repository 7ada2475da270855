"""Decoding: the right picture at every time, in every format."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from video import (
    FORMATS,
    FPS,
    SETTINGS,
    X264,
    decode,
    number_of,
    numbered,
    numbered_video,
    only,
    write_video,
)

from operators.decode_video import Frame, Missing, decode_frames
from operators.errors import MediaError
from operators.frame_index import read_index
from operators.probe_video import probe_video
from operators.settings import VideoSettings

KEYS = VideoSettings(timeout_s=60, exact_times=False)
COUNT = 160
TICK_S = 1 / FPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 numbered pictures in every format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, options in FORMATS.items():
        numbered_video(folder / name, COUNT, *options)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_the_picture_that_is_shown(folder: Path, name: str) -> None:
    draw = random.Random(name)
    facts = probe_video(str(folder / name), SETTINGS)
    # MPEG-PS and FLV, whose header has the length, count from other timestamps
    assert facts.duration_s == pytest.approx(COUNT / FPS, abs=0.2)
    last_s = facts.start_s + (COUNT - 0.5) / FPS
    times_s = sorted([facts.start_s, last_s, *(draw.uniform(facts.start_s, 6) for _ in range(10))])
    frames = only(decode_frames(str(folder / name), facts, times_s, SETTINGS))
    for time_s, frame in zip(times_s, frames, strict=True):
        assert frame.pixels.shape == (144, 192, 3)
        assert frame.pixels.dtype == np.uint8
        number = number_of(frame.pixels)
        assert number == pytest.approx((frame.time_s - facts.start_s) * FPS, abs=0.05)
        # the last one that is not after the time; Matroska rounds to milliseconds
        # MPEG-PS has not a time for every one
        ticks = 2 if name == "a.mpg" else 1
        assert -0.001 <= time_s - frame.time_s < ticks * TICK_S + 0.001


@pytest.mark.parametrize("name", FORMATS)
def test_key_frames(folder: Path, name: str) -> None:
    facts = probe_video(str(folder / name), SETTINGS)
    times_s = [facts.start_s + 0.3 + index for index in range(6)]
    frames = only(decode_frames(str(folder / name), facts, times_s, KEYS))
    found = subprocess.run(
        [
            *("ffprobe", "-v", "error", "-select_streams", "v", "-of", "default=nw=1"),
            *("-show_entries", "frame=key_frame", str(folder / name)),
        ],
        capture_output=True,
        check=True,
    ).stdout.split()
    keys = [place for place, line in enumerate(found) if line == b"key_frame=1"]
    longest_s = max(np.diff([*keys, COUNT])) / FPS
    for time_s, frame in zip(times_s, frames, strict=True):
        number = number_of(frame.pixels)
        assert number == pytest.approx((frame.time_s - facts.start_s) * FPS, abs=0.05)
        # in AVI and MPEG-PS not every packet has the time when it is shown
        far = 3 if name.endswith((".avi", ".mpg")) else 0
        assert min(abs(number - place) for place in keys) <= far
        assert abs(frame.time_s - time_s) <= longest_s / 2 + 2 * TICK_S


def test_times_far_apart_and_close_together(folder: Path) -> None:
    times_s = [0.1, 0.1, 0.11, 0.13, 3.0, 6.2]
    _, found = decode(folder / "a.mp4", times_s)
    assert [number_of(frame.pixels) for frame in only(found)] == [2, 2, 2, 3, 75, 155]


def test_variable_rate(tmp_path: Path) -> None:
    """25 a second, then one each two seconds, then 25 again."""

    def shown_s(number: int) -> float:
        if number < 50:
            return number / 25
        return 2 + 2 * (number - 50) if number < 55 else 12 + (number - 55) / 25

    expression = "if(lt(N,50),N/25,if(lt(N,55),2+2*(N-50),12+(N-55)/25))/TB"
    times_s = [0.5, 1.99, 2.01, 3.5, 3.99, 4.01, 7.7, 9.0, 11.9, 12.0, 12.1, 13.0]
    for name in ("a.mkv", "a.mp4"):
        path = numbered_video(
            *(tmp_path / name, 100, "-vf", f"settb=1/1000,setpts='{expression}'"),
            *("-fps_mode", "passthrough", "-enc_time_base", "1/1000", *X264, "-g", "60"),
        )
        _, found = decode(path, times_s)
        for time_s, frame in zip(times_s, only(found), strict=True):
            expected = max(n for n in range(100) if shown_s(n) <= time_s)
            assert number_of(frame.pixels) == expected, (name, time_s)
            assert frame.time_s == pytest.approx(shown_s(expected), abs=0.002)


@pytest.mark.parametrize("name", ["slide.mkv", "slide.mp4"])
def test_a_picture_that_stands_for_minutes(tmp_path: Path, name: str) -> None:
    """As in a recorded talk: the picture of a moment whose neighbours are far away on both sides."""
    expression = "if(lt(N,50),N/25,200+(N-50)/25)/TB"
    path = numbered_video(
        *(tmp_path / name, 75, "-vf", f"settb=1/1000,setpts='{expression}'"),
        *("-fps_mode", "passthrough", "-enc_time_base", "1/1000", *X264, "-g", "25", "-bf", "2"),
    )
    for time_s in (60.0, 199.5):
        _, found = decode(path, [time_s])
        assert number_of(only(found)[0].pixels) == 49, time_s
    _, found = decode(path, [0.5, 30.0, 199.9, 200.2])
    assert [number_of(frame.pixels) for frame in only(found)] == [12, 49, 49, 55]


def test_a_seek_that_lands_behind_its_time_gives_no_picture_of_another(tmp_path: Path) -> None:
    """FLV seeks by times of decoding: one just before a key frame is shown lands there."""
    path = numbered_video(
        tmp_path / "a.flv", 500, *X264, "-g", "250", "-bf", "3", "-sc_threshold", "0"
    )
    for times_s in ([9.97], [1.0, 9.97, 14.5], [1.0, 9.93]):
        _, found = decode(path, times_s)
        numbers = [number_of(frame.pixels) for frame in only(found)]
        assert numbers == [int(time_s * FPS) for time_s in times_s]


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_a_stream_that_starts_late(tmp_path: Path, name: str) -> None:
    """With sound before it; the times are those of the file, not of the stream."""
    plain = numbered_video(tmp_path / "plain.mp4", 100, *X264, "-g", "25")
    path = tmp_path / name
    subprocess.run(
        [
            *("ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=d=8", "-itsoffset", "3.2"),
            *("-i", str(plain), "-map", "1:v", "-map", "0:a", "-c:v", "copy", str(path)),
        ],
        check=True,
    )
    facts, found = decode(path, [3.3, 5.0, 7.1])
    assert facts.start_s == pytest.approx(3.2, abs=0.05)
    for time_s, frame in zip([3.3, 5.0, 7.1], only(found), strict=True):
        assert abs(number_of(frame.pixels) / FPS + facts.start_s - time_s) < 1.5 * TICK_S


@pytest.mark.parametrize("name", ["late.mkv", "late.ts"])
def test_nothing_far_away_is_read_for_a_time_before_the_first_picture(
    tmp_path: Path, name: str
) -> None:
    """Sound often begins half a second earlier. No wider look finds a picture there, and one of an hour
    to both sides reads gigabytes, for the first span of each such file."""
    plain = numbered_video(tmp_path / "plain.mp4", 20 * FPS, *X264, "-g", "25", "-bf", "0")
    path = tmp_path / name
    subprocess.run(
        [
            *("ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=d=20", "-itsoffset", "0.5"),
            *("-i", str(plain), "-map", "1:v", "-map", "0:a", "-c:v", "copy", str(path)),
        ],
        check=True,
    )
    facts = probe_video(str(path), SETTINGS)
    assert facts.start_s == pytest.approx(0.5, abs=0.05)
    index = read_index(str(path), facts, [(0.0, 1.0)], SETTINGS, time.monotonic() + 60)
    seconds = index.shown_us / 1e6 - facts.origin_s
    assert seconds[0] == pytest.approx(0.5, abs=0.05)
    assert 1.0 <= seconds[-1] < 3.0


def test_an_edit_list_that_cuts_the_start_off(tmp_path: Path) -> None:
    plain = numbered_video(tmp_path / "plain.mp4", 100, *X264, "-g", "50")
    path = tmp_path / "edited.mp4"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-ss", "0.6", "-i", str(plain), "-c", "copy", str(path)],
        check=True,
    )
    _, found = decode(path, [0.0, 0.5, 2.0])
    numbers = [number_of(frame.pixels) for frame in only(found)]
    # its first packets are there, for the decoder only
    assert numbers == [15, 27, 65]


def test_times_behind_the_end(folder: Path) -> None:
    _, found = decode(folder / "a.mkv", [1.0, 6.41, 20.0])
    assert isinstance(found[0], Frame)
    # a header may be a little off
    assert number_of(only(found[1:2])[0].pixels) == COUNT - 1
    assert found[2] == Missing(20.0)
    with pytest.raises(MediaError) as error:
        decode(folder / "a.mkv", [20.0, 30.0])
    assert error.value.code == "decode.corrupt"
    assert decode(folder / "a.mkv", [])[1] == []


def test_a_stream_that_changes_its_size(tmp_path: Path) -> None:
    parts = []
    for name, factor in (("a.ts", 1), ("b.ts", 2)):
        pictures = [numbered(n, 192 * factor, 144 * factor) for n in range(50)]
        # on the first one's clock; an offset is of the time of decoding, two pictures early
        later = ("-output_ts_offset", str((2 + 2 * TICK_S) * len(parts)))
        write_video(tmp_path / name, pictures, *X264, "-g", "25", *later)
        parts.append((tmp_path / name).read_bytes())
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    facts = probe_video(str(path), SETTINGS)
    found = decode_frames(str(path), facts, [0.5, 1.5, 2.5], SETTINGS, (96, 72))
    assert all(frame.pixels.shape == (72, 96, 3) for frame in only(found))
    assert [number_of(frame.pixels) for frame in only(found)] == [12, 37, 12]


def test_many_pictures_in_several_processes(folder: Path) -> None:
    """512 MB hold six inputs of a small picture; the result does not depend on that."""
    times_s = [0.05 + 0.4 * index for index in range(15)]
    key_each = folder / "mjpeg.mov"
    _, wide = decode(key_each, times_s)
    _, narrow = decode(key_each, times_s, SETTINGS.model_copy(update={"max_memory_bytes": 1 << 28}))
    for one, other in zip(only(wide), only(narrow), strict=True):
        assert one.time_s == other.time_s
        assert np.array_equal(one.pixels, other.pixels)


def test_limits(folder: Path) -> None:
    hasty = SETTINGS.model_copy(update={"timeout_s": 0.001})
    facts = probe_video(str(folder / "a.mp4"), SETTINGS)
    with pytest.raises(MediaError) as error:
        decode_frames(str(folder / "a.mp4"), facts, [1.0], hasty)
    assert error.value.code == "decode.timeout"
