"""Decoding: pictures as a player shows them, upright, with square pixels and true colours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from video import (
    SETTINGS,
    X264,
    decode,
    number_of,
    numbered,
    only,
    write_video,
)

from operators.probe_video import probe_video


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
