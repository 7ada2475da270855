"""Sample: which moments of a segment are looked at."""

from __future__ import annotations

import math


def sample_times(start_s: float, end_s: float, fps: float, max_frames: int) -> list[float]:
    """The middles of equal parts of [start_s, end_s), in seconds; at least one.

    As many parts as `fps` frames a second give (rounded), at most max_frames. Middles, because a cut
    is often a fade, and because the last one is inside of the stream even where its header is off by
    a frame.
    """
    if end_s <= start_s:
        raise ValueError(f"a segment from {start_s} s to {end_s} s has no frames")
    # half up: round() would go to the even number
    count = math.floor((end_s - start_s) * fps + 0.5)
    count = min(max(1, count), max_frames)
    step_s = (end_s - start_s) / count
    return [start_s + (index + 0.5) * step_s for index in range(count)]
