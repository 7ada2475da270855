"""Decoding: the right picture at every time, in every format; pictures as a player shows them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from video import FORMATS, FPS, X264, number_of, numbered, numbered_video, write_video

from operators.decode_video import Frame, Missing, decode_frames
from operators.errors import MediaError
from operators.probe_video import VideoFacts, probe_video
from operators.settings import VideoSettings

SETTINGS = VideoSettings(timeout_s=60)
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


def decode(
    path: Path,
    times_s: list[float],
    settings: VideoSettings = SETTINGS,
    size: tuple[int, int] | None = None,
) -> tuple[VideoFacts, list[Frame | Missing]]:
    facts = probe_video(str(path), settings)
    return facts, decode_frames(str(path), facts, times_s, settings, size)


def only(found: list[Frame | Missing]) -> list[Frame]:
    assert all(isinstance(one, Frame) for one in found), found
    return [one for one in found if isinstance(one, Frame)]


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
    assert facts.has_sound
    assert facts.start_s == pytest.approx(3.2, abs=0.05)
    for time_s, frame in zip([3.3, 5.0, 7.1], only(found), strict=True):
        assert abs(number_of(frame.pixels) / FPS + facts.start_s - time_s) < 1.5 * TICK_S


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


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied_once(tmp_path: Path, degrees: int) -> None:
    upright = numbered(0xA5C)
    stored = np.rot90(upright, degrees // 90)
    plain = write_video(tmp_path / "plain.mp4", [stored] * 10, *X264, "-crf", "10")
    path = tmp_path / "turned.mp4"
    # this writes the display matrix, which turns the other way
    turn = ("-metadata:s:v", f"rotate={-degrees % 360}")
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(plain), "-c", "copy", *turn, str(path)],
        check=True,
    )
    facts, found = decode(path, [0.1])
    assert facts.rotation == degrees
    assert facts.display_size == (192, 144)
    assert (facts.width, facts.height) == ((192, 144) if degrees % 180 == 0 else (144, 192))
    (frame,) = only(found)
    assert number_of(frame.pixels) == 0xA5C
    assert np.abs(frame.pixels.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (192, 72)), ("1/2", (96, 144))])
def test_pixels_become_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    width, height = size
    picture = numbered(0x5A3, width, height)
    options = ("-vf", f"setsar={aspect}", *X264)
    path = write_video(tmp_path / "a.mp4", [picture] * 5, *options)
    facts, found = decode(path, [0.1])
    assert facts.display_size == ((384, 72) if aspect == "2/1" else (96, 288))
    (frame,) = only(found)
    assert frame.pixels.shape == (*facts.display_size[::-1], 3)
    assert number_of(frame.pixels) == 0x5A3


@pytest.mark.parametrize("size", [(63, 37), (2, 2), (1, 16), (641, 3)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    shade = np.linspace(20, 230, width)[None, :, None].repeat(height, 0).repeat(3, 2)
    picture = shade.astype(np.uint8)
    path = write_video(tmp_path / "a.mkv", [picture] * 4, "-c:v", "ffv1", "-pix_fmt", "yuv444p")
    facts, found = decode(path, [0.05])
    assert facts.display_size == size
    (frame,) = only(found)
    assert np.abs(frame.pixels.astype(int) - picture).max() <= 3


COLOURS = np.array([[[200, 30, 40], [30, 180, 60], [40, 50, 210], [128, 128, 128]]], np.uint8)
PALETTE = COLOURS.repeat(36, axis=1).repeat(96, axis=0)


def colour_error(path: Path, picture: np.ndarray = PALETTE) -> float:
    (frame,) = only(decode(path, [0.05])[1])
    middles = [picture.shape[1] * (2 * part + 1) // 8 for part in range(4)]
    here = frame.pixels[10:-10, middles].astype(int)
    return float(np.abs(here - picture[10:-10, middles]).max())


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("out_range", ["tv", "pc"])
def test_colours_by_matrix_and_range(tmp_path: Path, matrix: str, out_range: str) -> None:
    scale = {"smpte170m": "smpte170m", "bt709": "bt709", "bt2020nc": "bt2020"}[matrix]
    path = write_video(
        *(tmp_path / "a.mp4", [PALETTE] * 4),
        *("-vf", f"scale=out_color_matrix={scale}:out_range={out_range}"),
        *("-colorspace", matrix, "-color_range", out_range, *X264, "-crf", "5"),
    )
    assert colour_error(path) <= 6


@pytest.mark.parametrize(("lines", "matrix"), [(96, "smpte170m"), (720, "bt709")])
def test_colours_of_a_stream_that_says_nothing(tmp_path: Path, lines: int, matrix: str) -> None:
    picture = COLOURS.repeat(8, axis=1).repeat(lines, axis=0)
    path = write_video(
        *(tmp_path / "a.mp4", [picture] * 2),
        *("-vf", f"scale=out_color_matrix={matrix}:out_range=tv", *X264, "-crf", "5"),
        *("-colorspace", "unknown", "-color_primaries", "unknown"),
    )
    assert probe_video(str(path), SETTINGS).matrix == ""
    assert colour_error(path, picture) <= 6


def test_ten_bits(tmp_path: Path) -> None:
    path = write_video(
        *(tmp_path / "a.mkv", [PALETTE] * 4, "-pix_fmt", "yuv420p10le"),
        *("-c:v", "libx265", "-preset", "ultrafast", "-crf", "5", "-x265-params", "log-level=0"),
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709"),
    )
    facts = probe_video(str(path), SETTINGS)
    assert (facts.bit_depth, facts.hdr) == (10, False)
    assert colour_error(path) <= 6


def hdr_signal(picture: np.ndarray, transfer: str) -> np.ndarray:
    """A picture for an ordinary display of 100 nits, as BT.2100's signal in BT.2020 colours."""
    light = (picture / 255.0) ** 2.4
    # BT.2087
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    light = light @ np.array(to_2020).T
    if transfer == "smpte2084":
        power = (light / 100) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        # 100 nits of 1000, without the system's gamma
        scene = light / 10
        log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
    return np.round(255 * signal).astype(np.uint8)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_looks_like_what_an_ordinary_display_shows(tmp_path: Path, transfer: str) -> None:
    """Without tone mapping colours would be pale."""
    path = write_video(
        *(tmp_path / "a.mp4", [hdr_signal(PALETTE, transfer)] * 4, "-pix_fmt", "yuv420p10le"),
        *("-vf", "scale=out_color_matrix=bt2020:out_range=tv", "-color_trc", transfer),
        *("-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_range", "tv"),
        *("-c:v", "libx265", "-preset", "ultrafast", "-crf", "5", "-x265-params", "log-level=0"),
    )
    facts, found = decode(path, [0.05])
    assert (facts.bit_depth, facts.hdr, facts.transfer) == (10, True, transfer)
    (frame,) = only(found)
    red, green, blue, grey = (frame.pixels[48, 18 + 36 * place].astype(int) for place in range(4))
    assert red.argmax() == 0
    assert green.argmax() == 1
    assert blue.argmax() == 2
    assert red[0] - red[1:].max() > 60
    assert np.ptp(grey) <= 8
    assert 60 < grey.mean() < 190


@pytest.mark.parametrize("matrix", [(), ("-colorspace", "bt2020c")])
def test_hdr_that_does_not_say_all_of_itself(tmp_path: Path, matrix: tuple[str, ...]) -> None:
    def shown(name: str, *tags: str) -> np.ndarray:
        path = write_video(
            *(tmp_path / name, [hdr_signal(PALETTE, "smpte2084")], "-pix_fmt", "yuv420p10le"),
            *("-vf", "scale=out_color_matrix=bt2020:out_range=tv", *X264, "-crf", "5"),
            *("-color_trc", "smpte2084", *tags),
        )
        (frame,) = only(decode(path, [0.01])[1])
        return frame.pixels

    whole = shown("whole.mp4", "-color_primaries", "bt2020", "-colorspace", "bt2020nc")
    assert np.array_equal(shown("part.mp4", *matrix), whole)


def test_interlaced_pictures_have_no_combs(tmp_path: Path) -> None:
    """A bar that moves by 16 px from field to field: its edge is a comb of 16 px if weaved."""

    def picture(place: int) -> np.ndarray:
        found = np.full((144, 192, 3), 40, np.uint8)
        found[:, (16 * place) % 160 : (16 * place) % 160 + 32] = 200
        return found

    weave = "interlace=scan=tff:lowpass=0,setfield=tff"
    for name, options in (
        ("a.ts", ("-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ildct+ilme", "-top", "1")),
        ("a.mp4", ("-c:v", "libx264", "-x264-params", "tff=1", "-crf", "10")),
    ):
        path = write_video(
            *(tmp_path / name, map(picture, range(50)), "-vf", weave, *options), fps=50
        )
        facts, found = decode(path, [0.5])
        assert facts.interlaced
        (frame,) = only(found)
        lines = frame.pixels[20:-20, :, 0].astype(int)
        assert np.abs(np.diff(lines, axis=0)).mean() < 2, name


def test_scaling_in_the_decoder_is_near_to_a_resize_of_the_whole_picture(tmp_path: Path) -> None:
    import torch

    grain = np.random.default_rng(1).integers(0, 256, (54, 96, 1), np.uint8)
    whole = grain.repeat(20, axis=0).repeat(20, axis=1).repeat(3, axis=2)
    path = write_video(tmp_path / "a.mp4", [whole] * 2, *X264, "-crf", "12")
    (full,) = only(decode(path, [0.02])[1])
    (small,) = only(decode(path, [0.02], size=(480, 336))[1])
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(full.pixels.copy()).permute(2, 0, 1)[None],
        size=[336, 480],
        mode="bicubic",
        antialias=True,
    )[0].permute(1, 2, 0)
    error = (small.pixels.astype(float) - resized.numpy()) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 40


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


def test_many_pictures_in_several_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
