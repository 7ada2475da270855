"""Damage: whatever is cut off or flipped, a video ends as whole, partial or with a code, in time."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from video import FORMATS, FPS, X264, number_of, numbered_video

from operators.decode_video import Frame, Missing, decode_frames
from operators.errors import MediaError
from operators.probe_video import probe_video
from operators.settings import VideoSettings
from operators.shots import segments

SETTINGS = VideoSettings(timeout_s=30, min_s=1, max_s=4)
COUNT = 150
NAMES = (
    "a.mp4",
    "fast.mov",
    "frag.mp4",
    "a.mkv",
    "vp9.webm",
    "hevc.mkv",
    "av1.mp4",
    "a.ts",
    "a.avi",
)
TIMES_S = [0.5, 1.7, 2.9, 4.1, 5.3]
# as many as the generator makes
VARIANTS = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: numbered_video(folder / name, COUNT, *FORMATS[name]).read_bytes() for name in NAMES
    }


def outcome(path: Path) -> tuple[str, list[Frame | Missing]]:
    """ok, partial or a code, and what came."""
    started = time.monotonic()
    try:
        facts = probe_video(str(path), SETTINGS)
        found = decode_frames(str(path), facts, TIMES_S, SETTINGS, (96, 72))
    except MediaError as error:
        return error.code, []
    finally:
        assert time.monotonic() - started < 3 * SETTINGS.timeout_s
    assert [isinstance(one, Frame) or one.time_s for one in found].count(True) > 0
    assert len(found) == len(TIMES_S)
    missing = any(isinstance(one, Missing) for one in found)
    return ("partial" if missing else "ok"), found


@pytest.mark.parametrize("percent", [10, 50, 90])
@pytest.mark.parametrize("name", NAMES)
def test_cut_off(whole: dict[str, bytes], tmp_path: Path, name: str, percent: int) -> None:
    path = tmp_path / name
    data = whole[name]
    path.write_bytes(data[: len(data) * percent // 100])
    result, found = outcome(path)
    if name in ("a.mp4", "av1.mp4"):
        # the index is at the end
        assert result in ("decode.corrupt", "decode.unsupported")
        return
    assert result in ("ok", "partial", "decode.corrupt", "decode.no_video", "decode.unsupported")
    if percent == 10:
        assert result != "ok"
    if percent == 50:
        assert result == "partial" or name in ("a.ts", "frag.mp4", "a.avi")
    # what there is, is what it says it is
    for time_s, one in zip(TIMES_S, found, strict=False):
        if isinstance(one, Frame):
            assert abs(one.time_s - time_s) <= 4 / FPS
            if percent == 50 and time_s < 2:
                assert number_of(one.pixels) == pytest.approx(one.time_s * FPS, abs=2.1)


def test_flipped_bytes(whole: dict[str, bytes], tmp_path: Path) -> None:
    def variant(seed: int) -> str:
        draw = random.Random(seed)
        name = NAMES[seed % len(NAMES)]
        data = bytearray(whole[name])
        for _ in range(draw.choice((1, 10, 100))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{seed}.{name}"
        path.write_bytes(data)
        return outcome(path)[0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(variant, range(VARIANTS)))
    allowed = {"ok", "partial", "decode.corrupt", "decode.unsupported", "decode.no_video"}
    # a flipped header may ask for any memory or time
    assert set(results) <= allowed | {"decode.out_of_memory", "decode.timeout", "decode.crashed"}
    assert results.count("ok") + results.count("partial") > VARIANTS // 2


def test_garbage_in_the_middle(whole: dict[str, bytes], tmp_path: Path) -> None:
    data = bytearray(whole["a.mkv"])
    third = len(data) // 3
    data[third : third + 200] = random.Random(0).randbytes(200)
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    result, found = outcome(path)
    assert result in ("ok", "partial")
    assert isinstance(found[0], Frame)
    assert isinstance(found[-1], Frame)
    assert number_of(found[-1].pixels) == pytest.approx(5.3 * FPS, abs=1)


@pytest.mark.parametrize("name", ["b.avi", "h264.avi"])
def test_a_file_whose_first_picture_is_no_key_frame(tmp_path: Path, name: str) -> None:
    """The first chunk's name is damaged; pictures come out of order, and AVI does not say when."""
    data = bytearray(numbered_video(tmp_path / "whole.avi", COUNT, *FORMATS[name]).read_bytes())
    first = data.index(b"movi") + 4
    data[first : first + 4] = b"junk"
    path = tmp_path / name
    path.write_bytes(data)
    facts = probe_video(str(path), SETTINGS)
    found = segments(str(path), facts, 0, SETTINGS)
    assert (found[0].start_s, found[-1].end_s) == (0, pytest.approx(COUNT / FPS, abs=0.1))
    # the pictures from the first key frame on; the lost one is missing from the count
    lost, *frames = decode_frames(str(path), facts, [0.5, 1.7, 2.9], SETTINGS)
    assert isinstance(lost, Missing)
    assert [number_of(one.pixels) for one in frames if isinstance(one, Frame)] == [43, 73]


@pytest.mark.parametrize("time_ms", [1 << 55, 1 << 62])
def test_pictures_at_a_time_that_no_number_holds(tmp_path: Path, time_ms: int) -> None:
    """Matroska's header is whole, and one of its clusters of a second claims to be of a distant age."""
    options = (*X264, "-g", "25", "-cluster_time_limit", "1000")
    data = numbered_video(tmp_path / "whole.mkv", 4 * FPS, *options).read_bytes()
    mark = bytes.fromhex("1f43b675")
    start = data.index(mark, data.index(mark, data.index(mark) + 4) + 4)
    end = data.index(mark, start + 4)
    time_at = data.index(b"\xe7", start + 4)
    blocks = data[time_at + 2 + (data[time_at + 1] & 0x7F) : end]
    size = (1 << 56 | 10 + len(blocks)).to_bytes(8, "big")
    cluster = mark + size + b"\xe7\x88" + time_ms.to_bytes(8, "big") + blocks
    path = tmp_path / "a.mkv"
    path.write_bytes(data[:start] + cluster + data[end:])
    facts = probe_video(str(path), SETTINGS)
    assert segments(str(path), facts, 0, SETTINGS)
    found = decode_frames(str(path), facts, [0.5, 1.7, 2.5, 3.5], SETTINGS)
    frames = [one for one in found if isinstance(one, Frame)]
    assert [number_of(one.pixels) for one in frames[:2]] == [12, 42]
    for one in frames:
        assert number_of(one.pixels) == pytest.approx(one.time_s * FPS, abs=0.1)
