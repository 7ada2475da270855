"""Cuts: where the picture changes at once, found with little decoding.

Key frames first: a stretch between two key frames that look alike has no cut, and is not decoded. The
others are decoded at 48x27 pixels, without what no other picture needs. A cut is a change that is large,
and large against those around it (the rule of PySceneDetect's AdaptiveDetector, with its numbers).

A cut depends on the stretch between its two key frames and on nothing else, so it is the same whatever
part of the file is looked at. A shot that comes and goes between two key frames is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from operators.frame_index import US, FrameIndex, read_index
from operators.probe_video import VideoFacts
from operators.seek_frames import Pixels, Run, Shape, plan_runs, seek_frames
from operators.settings import VideoSettings

WIDTH, HEIGHT = 48, 27
# A stretch without a key frame for so long is decoded without asking: 250 pictures are 10 s.
LONG_S = 12.0
# Mean change of red, green and blue, in percent of the full scale: of a cut, and of two key frames.
# PySceneDetect asks for 15 of 255.
LEAST_CHANGE = 6.0
ALIKE = 3.0
# Times the mean of the two changes before and the two after.
RATIO = 3.0
NEIGHBOURS = 2
# Beyond the end of what is asked: the neighbours of its last picture.
MARGIN_S = 1.0
MARGIN_FRAMES = 4
# Their decoders give all pictures, whatever they are told to skip (ffmpeg 5.1).
NO_SKIP = frozenset({"av1", "vp8", "vp9"})


class Cut(NamedTuple):
    """time_s: of the first picture behind it. score: the change in percent."""

    time_s: float
    score: float


def find_cuts(
    path: str, facts: VideoFacts, start_s: float, end_s: float, settings: VideoSettings
) -> list[Cut]:
    """The cuts in [start_s, end_s) of the time line, in order. Where nothing can be decoded is none.

    Raises MediaError decode.timeout.
    """
    ends = time.monotonic() + settings.timeout_s
    # a cut at the key frame at start_s is one of the stretch that ends there
    before_s = max(0.0, start_s - facts.frame_s)
    index = read_index(path, facts, [(before_s, end_s + LONG_S)], settings, ends)
    first_us, last_us = (round((at + facts.origin_s) * US) for at in (start_s, end_s))
    margin_us = round((MARGIN_S + MARGIN_FRAMES * facts.frame_s) * US)
    places = np.flatnonzero(index.visible & (index.shown_us <= last_us + margin_us))
    keys = np.flatnonzero(index.visible & index.key).tolist()
    if not len(places) or not keys:
        return []
    skips = index.exact and facts.codec not in NO_SKIP
    shape = Shape(WIDTH, HEIGHT, _small)
    # the last stretch ends at the next key frame, or it is a long one
    stretches = [
        pair
        for pair in pairwise([*keys, None])
        if index.shown_us[pair[0]] < last_us
        and (pair[1] is None or index.shown_us[pair[1]] >= first_us)
    ]
    asked = sorted({place for pair in stretches for place in pair if place is not None})
    runs = [Run(tuple(asked))] if skips else plan_runs(index, asked)
    decoder = {"skip_frame": "nokey"} if skips else {}
    pictures: dict[int, Pixels] = {}
    for got, _ in seek_frames(path, facts, index, runs, shape, settings, ends, decoder):
        pictures.update(got)
    changed = [
        (first, min(last, int(places[-1])) if last is not None else int(places[-1]))
        for first, last in stretches
        if _may_differ(index, first, last, pictures)
    ]
    decoder = {"skip_frame": "noref", "skip_loop_filter": "all"} if index.exact else {}
    frames: list[tuple[int, Pixels]] = []
    every = [Run(tuple(range(first, last + 1)), every=True) for first, last in _joined(changed)]
    for got, _ in seek_frames(path, facts, index, every, shape, settings, ends, decoder):
        frames += got
    cuts = [
        cut
        for first, last in changed
        for cut in cuts_among(_between(frames, index.shown_us[first], index.shown_us[last]))
    ]
    return [
        Cut(time_us / US - facts.origin_s, score)
        for time_us, score in cuts
        if first_us <= time_us < last_us
    ]


def cuts_among(frames: Sequence[tuple[int, Pixels]]) -> list[tuple[int, float]]:
    """(microseconds, change in percent) of each cut among pictures in order."""
    if len(frames) < 2:
        return []
    stack = np.stack([pixels for _, pixels in frames]).astype(np.int16)
    change = np.abs(np.diff(stack, axis=0)).mean(axis=(1, 2, 3)) * (100 / 255)
    found = []
    for place, score in enumerate(change.tolist()):
        around = [
            *change[max(0, place - NEIGHBOURS) : place],
            *change[place + 1 : place + 1 + NEIGHBOURS],
        ]
        usual = float(np.mean(around)) if around else 0.0
        if score >= LEAST_CHANGE and score >= RATIO * usual:
            found.append((frames[place + 1][0], score))
    return found


def _may_differ(
    index: FrameIndex, first: int, last: int | None, pictures: dict[int, Pixels]
) -> bool:
    """Whether there may be a cut between two key frames."""
    if last is None or index.shown_us[last] - index.shown_us[first] > LONG_S * US:
        return True
    before = pictures.get(int(index.shown_us[first]))
    after = pictures.get(int(index.shown_us[last]))
    if before is None or after is None:
        return True
    return float(np.abs(before.astype(np.int16) - after).mean()) * (100 / 255) >= ALIKE


def _joined(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in stretches:
        if joined and first == joined[-1][1]:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _between(
    frames: Sequence[tuple[int, Pixels]], first_us: int, last_us: int
) -> list[tuple[int, Pixels]]:
    return [frame for frame in frames if first_us <= frame[0] <= last_us]


def _small(stream: Any) -> Any:  # noqa: ANN401
    return stream.filter("scale", WIDTH, HEIGHT, flags="bilinear")
