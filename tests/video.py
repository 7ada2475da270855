"""Test videos whose pictures show their own number, made here with ffmpeg, and their pictures decoded."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from operators.decode_video import Frame, Missing, decode_frames
from operators.probe_video import VideoFacts, probe_video
from operators.settings import VideoSettings

Pixels = npt.NDArray[np.uint8]

# 12 bits in 4 x 3 blocks of 48 px
COLUMNS, ROWS, BLOCK = 4, 3, 48
WIDTH, HEIGHT = COLUMNS * BLOCK, ROWS * BLOCK
FPS = 25
SETTINGS = VideoSettings(timeout_s=60)


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> Pixels:
    """A picture that shows 12 bits as dark and bright blocks."""
    bits = np.array([number >> bit & 1 for bit in range(COLUMNS * ROWS)]).reshape(ROWS, COLUMNS)
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    levels = (60 + 130 * bits)[rows][:, columns].astype(np.uint8)
    return np.repeat(levels[:, :, None], 3, axis=2)


def number_of(pixels: Pixels) -> int:
    """What `numbered` was given, at any size."""
    height, width = pixels.shape[:2]
    ys = ((np.arange(ROWS) + 0.5) * height / ROWS).astype(int)
    xs = ((np.arange(COLUMNS) + 0.5) * width / COLUMNS).astype(int)
    dy, dx = max(1, height // ROWS // 4), max(1, width // COLUMNS // 4)
    bits = [pixels[y - dy : y + dy + 1, x - dx : x + dx + 1].mean() > 125 for y in ys for x in xs]
    return sum(int(bit) << place for place, bit in enumerate(bits))


def write_video(
    path: Path,
    pictures: Iterable[Pixels],
    *options: str,
    fps: float = FPS,
    before: Sequence[str] = (),
) -> Path:
    """RGB pictures of one size through ffmpeg; `before` are further inputs, `options` its output's."""
    frames = [np.ascontiguousarray(picture) for picture in pictures]
    height, width = frames[0].shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    default = [] if "-pix_fmt" in options else ["-pix_fmt", "yuv420p"]
    subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-y",
            *source,
            "-i",
            "pipe:",
            *before,
            *default,
            *options,
            str(path),
        ],
        input=b"".join(frame.tobytes() for frame in frames),
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return path


def numbered_video(path: Path, count: int, *options: str, fps: float = FPS) -> Path:
    return write_video(path, map(numbered, range(count)), *options, fps=fps)


X264 = ("-c:v", "libx264", "-preset", "veryfast")
# file name -> output options: every container and codec that the tests know
FORMATS = {
    "a.mp4": (*X264, "-g", "40", "-bf", "3"),
    "fast.mov": (*X264, "-g", "25", "-movflags", "+faststart"),
    "frag.mp4": (*X264, "-g", "25", "-movflags", "frag_keyframe+empty_moov"),
    "open.mp4": (*X264, "-x264-params", "open-gop=1:keyint=30:min-keyint=30:bframes=3:scenecut=0"),
    "open.mkv": (*X264, "-x264-params", "open-gop=1:keyint=30:min-keyint=30:bframes=3:scenecut=0"),
    "a.mkv": (*X264, "-g", "50"),
    "hevc.mkv": (
        "-c:v",
        "libx265",
        "-preset",
        "ultrafast",
        "-x265-params",
        "keyint=40:log-level=0",
    ),
    "hevc.mp4": (
        *("-c:v", "libx265", "-preset", "ultrafast", "-tag:v", "hvc1"),
        *("-x265-params", "keyint=30:open-gop=1:bframes=3:log-level=0"),
    ),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "50"),
    "vp8.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-g", "50"),
    "av1.mp4": ("-c:v", "libsvtav1", "-preset", "12", "-g", "50"),
    "a.ts": (*X264, "-g", "40"),
    "mpeg2.ts": ("-c:v", "mpeg2video", "-q:v", "3", "-g", "15", "-bf", "2"),
    "a.mpg": ("-c:v", "mpeg2video", "-q:v", "3", "-g", "15", "-bf", "2"),
    "a.avi": ("-c:v", "mpeg4", "-q:v", "3", "-g", "30"),
    "b.avi": ("-c:v", "mpeg4", "-q:v", "3", "-g", "30", "-bf", "2"),
    "h264.avi": (*X264, "-g", "40", "-bf", "2"),
    "a.flv": (*X264, "-g", "40"),
    "a.wmv": ("-c:v", "wmv2", "-q:v", "3", "-g", "30"),
    "a.ogv": ("-c:v", "libtheora", "-q:v", "8", "-g", "32"),
    "mjpeg.mov": ("-c:v", "mjpeg", "-q:v", "3"),
    "prores.mov": ("-c:v", "prores_ks", "-profile:v", "0", "-pix_fmt", "yuv422p10le"),
    "a.mxf": ("-c:v", "mpeg2video", "-q:v", "3", "-g", "15"),
}


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
