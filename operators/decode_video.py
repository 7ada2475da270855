"""Decode: the pictures of given moments, upright, with square pixels, as rgb24.

The picture of a moment is the one being shown: the last one whose timestamp is not after it. An index
(frame_index.py) tells which one that is and from which key frame it is decoded; one ffmpeg process
gives them all (seek_frames.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from operators.errors import MediaError
from operators.frame_index import US, FrameIndex, read_index
from operators.probe_video import VideoFacts
from operators.seek_frames import Pixels, Shape, plan_runs, seek_frames
from operators.settings import VideoSettings

# How far behind a time a key frame is looked for.
KEY_AHEAD_S = 10.0
HD_LINES = 720
# PQ and HLG to an ordinary display, after the scaling, where it is cheap. 100 nits are white, brighter
# light is pressed into what is left (Hable's curve); BT.2020 to BT.709.
TONE_MAP: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zscale", {"t": "linear", "npl": 100}),
    ("format", {"pix_fmts": "gbrpf32le"}),
    ("zscale", {"p": "bt709"}),
    ("tonemap", {"tonemap": "hable", "desat": 0}),
    ("zscale", {"t": "bt709", "m": "bt709", "r": "pc"}),
    ("format", {"pix_fmts": "yuv444p"}),
)


@dataclass(frozen=True)
class Frame:
    """The picture of a moment; several moments may have one picture.

    pixels: uint8 [height, width, 3]; time_s: its own time on the file's time line.
    """

    time_s: float
    pixels: Pixels


@dataclass(frozen=True)
class Missing:
    """A moment without a picture: the file is damaged or ends before it."""

    time_s: float


def decode_frames(
    path: str,
    facts: VideoFacts,
    times_s: Sequence[float],
    settings: VideoSettings,
    size: tuple[int, int] | None = None,
) -> list[Frame | Missing]:
    """One entry for each time (seconds of the time line, in order).

    size: (width, height) to scale to; None: facts.display_size. Without settings.exact_times the key
    frames next to the times. Raises MediaError decode.* where not one picture can be had.
    """
    if not times_s:
        return []
    ends = time.monotonic() + settings.timeout_s
    asked_us = [round((time_s + facts.origin_s) * US) for time_s in times_s]
    index = read_index(path, facts, _stretches(times_s, settings), settings, ends)
    find = index.picture if settings.exact_times else index.nearest_key
    places = [find(time_us) for time_us in asked_us]
    wanted = sorted({place for place in places if place is not None})
    width, height = size or facts.display_size
    shape = Shape(width, height, lambda stream: upright(stream, facts, width, height))
    pictures: list[tuple[int, Pixels]] = []
    failure: MediaError | None = None
    for got, done in seek_frames(
        path, facts, index, plan_runs(index, wanted), shape, settings, ends
    ):
        pictures += got
        if not got and failure is None:
            failure = done.failure()
    if not pictures:
        raise failure or MediaError("decode.corrupt", "no picture is at the times asked for")
    return list(_answers(times_s, places, index, pictures, facts))


def _stretches(times_s: Sequence[float], settings: VideoSettings) -> list[tuple[float, float]]:
    """What of the file to read to find the pictures of these times."""
    if settings.exact_times:
        return [(time_s, time_s) for time_s in times_s]
    gaps = [later - earlier for earlier, later in pairwise(times_s)]
    ahead = [min(gap / 2, KEY_AHEAD_S) for gap in [*gaps, 2 * KEY_AHEAD_S]]
    return [(time_s, time_s + more) for time_s, more in zip(times_s, ahead, strict=True)]


def upright(stream: Any, facts: VideoFacts, width: int, height: int) -> Any:  # noqa: ANN401
    """Filters from decoded pictures to a size. ffmpeg itself has turned them upright before."""
    if facts.interlaced is not False:
        # looks at one picture only, so it needs no neighbours; leaves progressive ones alone
        stream = stream.filter("estdif", mode="frame", deint="interlaced")
    stream = stream.filter(
        "scale",
        width,
        height,
        # the kernel of torch's and Pillow's bicubic: a = -0.5
        flags="bicubic+accurate_rnd+full_chroma_int",
        param0=0,
        param1=0.5,
        in_color_matrix=_matrix(facts),
    )
    if facts.hdr:
        stream = stream.filter("setparams", **_light(facts))
        for name, options in TONE_MAP:
            stream = stream.filter(name, **options)
    return stream


def _light(facts: VideoFacts) -> dict[str, str]:
    """What the signal is, as far as the stream does not say it: zscale refuses one that says a part.

    BT.2020 then, to which PQ and HLG belong. Its constant luminance zscale knows for neither.
    """
    known = {"color_trc": facts.transfer}
    if not facts.primaries:
        known["color_primaries"] = "bt2020"
    if facts.matrix in ("", "bt2020c"):
        known["colorspace"] = "bt2020nc"
    return known


def _matrix(facts: VideoFacts) -> str:
    """As players do: what the stream says, else BT.709 from 720 lines on and BT.601 below."""
    if facts.matrix or facts.pixel_format.startswith(("rgb", "gbr", "bgr", "gray")):
        return "auto"
    return "bt709" if facts.height >= HD_LINES else "bt601"


def _answers(
    times_s: Sequence[float],
    places: Sequence[int | None],
    index: FrameIndex,
    pictures: list[tuple[int, Pixels]],
    facts: VideoFacts,
) -> Iterator[Frame | Missing]:
    found = dict(pictures)
    have = np.array(sorted(found))
    # of a damaged picture the next one may have come, which is not further than this
    tick_us = 1.5 * facts.frame_s * US
    for time_s, place in zip(times_s, places, strict=True):
        if place is None:
            yield Missing(time_s)
            continue
        wanted_us = index.shown_us[place]
        time_us = int(have[np.argmin(np.abs(have - wanted_us))])
        if abs(time_us - wanted_us) > tick_us:
            yield Missing(time_s)
        else:
            yield Frame(time_us / US - facts.origin_s, found[time_us])
