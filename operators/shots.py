"""Segments: where a video is divided into windows, as a pure function of the file and the settings.

    shots     block k of four max_s begins at the strongest cut within half a max_s of its place, or
              there if there is none. Inside of a block the strongest cuts come first, each at least
              min_s from any other border; what is still longer than max_s is split evenly.
    fixed     every max_s
    whole     one segment
    span      some blocks in a row: a row of work

A block's segments depend on the cuts in it and around its two borders, and on nothing else, so two
workers find the same border where their spans meet, and the segments do not depend on the spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from operators.find_cuts import Cut, find_cuts
from operators.probe_video import VideoFacts
from operators.settings import VideoSettings

# More segments a block would make rows of work coarser, fewer would cut more long shots at its ends.
SEGMENTS_A_BLOCK = 4
# So little at the end belongs to the segment before it.
LEAST_S = 0.5


class Segment(NamedTuple):
    """[start_s, end_s) on the file's time line."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Grid:
    """The blocks of a video that ends at end_s. Border 0 is its start, border `blocks` its end."""

    block_s: float
    reach_s: float
    blocks: int
    blocks_per_span: int
    end_s: float

    @property
    def spans(self) -> int:
        return -(-self.blocks // self.blocks_per_span)

    def span(self, index: int) -> range:
        """The blocks of a span."""
        first = index * self.blocks_per_span
        return range(first, min(first + self.blocks_per_span, self.blocks))

    def place(self, border: int) -> float:
        """Where a border lies if there is no cut near it."""
        return self.end_s if border == self.blocks else border * self.block_s

    def tiles(self, blocks: range) -> Iterator[tuple[float, float]]:
        """Stretches (start_s, end_s) in a row whose cuts decide these blocks."""
        for border in range(blocks.start, blocks.stop + 1):
            start_s = max(0.0, border * self.block_s - self.reach_s)
            end_s = min(self.end_s, (border + 1) * self.block_s - self.reach_s)
            if border == blocks.stop:
                end_s = min(self.end_s, border * self.block_s + self.reach_s)
            if end_s > start_s:
                yield start_s, end_s


def grid(duration_s: float, settings: VideoSettings) -> Grid:
    """The grid of a video whose last picture ends at duration_s of its time line."""
    if settings.segment == "whole":
        return Grid(duration_s, 0.0, 1, 1, duration_s)
    block_s = SEGMENTS_A_BLOCK * settings.max_s
    if settings.segment == "fixed":
        reach_s, least_s = 0.0, LEAST_S
    else:
        reach_s, least_s = settings.max_s / 2, settings.max_s / 2 + settings.min_s
    return Grid(
        block_s=block_s,
        reach_s=reach_s,
        # the last border must not come too near to the end, wherever its cut is
        blocks=1 + max(0, int((duration_s - least_s) // block_s)),
        blocks_per_span=max(1, round(settings.span_s / block_s)),
        end_s=duration_s,
    )


def spans(duration_s: float, settings: VideoSettings) -> list[tuple[float, float]]:
    """Nominal (start_s, end_s) of each span. The borders lie within max_s / 2 of them."""
    found = grid(duration_s, settings)
    starts = [found.place(found.span(index).start) for index in range(found.spans)]
    return list(pairwise([*starts, duration_s]))


def segments(
    path: str, facts: VideoFacts, span_index: int, settings: VideoSettings
) -> list[Segment]:
    """The segments of a span, in order. With `shots` its pictures are looked at (find_cuts.py).

    Raises MediaError decode.timeout.
    """
    found = grid(facts.duration_s, settings)
    blocks = found.span(span_index)
    cuts: list[Cut] = []
    if settings.segment == "shots":
        for start_s, end_s in found.tiles(blocks):
            cuts += find_cuts(path, facts, start_s, end_s, settings)
    whole = [one for block in blocks for one in divide(found, block, cuts, settings)]
    # a stream may start late, and has nothing before
    late = [Segment(max(one.start_s, facts.start_s), one.end_s) for one in whole]
    return [one for one in late if one.end_s > one.start_s]


def divide(grid: Grid, block: int, cuts: Sequence[Cut], settings: VideoSettings) -> list[Segment]:
    """The segments of a block. `cuts` holds at least all that its tiles have."""
    start_s, end_s = border(grid, block, cuts), border(grid, block + 1, cuts)
    if settings.segment == "whole":
        return [Segment(start_s, end_s)]
    if settings.segment == "fixed":
        count = max(1, -int(-(end_s - start_s - LEAST_S) // settings.max_s))
        starts = [start_s + index * settings.max_s for index in range(count)]
        return [Segment(*pair) for pair in pairwise([*starts, end_s])]
    inside = [cut for cut in cuts if start_s < cut.time_s < end_s]
    borders = chosen(start_s, end_s, inside, settings.min_s)
    return [
        part for first, last in pairwise(borders) for part in split(first, last, settings.max_s)
    ]


def border(grid: Grid, number: int, cuts: Sequence[Cut]) -> float:
    """Where block `number` begins: at the strongest cut in reach; of equal ones at the nearest."""
    place_s = grid.place(number)
    if number in (0, grid.blocks):
        return place_s
    near = [cut for cut in cuts if abs(cut.time_s - place_s) < grid.reach_s]
    if not near:
        return place_s
    best = min(near, key=lambda cut: (-cut.score, abs(cut.time_s - place_s), cut.time_s))
    return best.time_s


def chosen(start_s: float, end_s: float, cuts: Sequence[Cut], min_s: float) -> list[float]:
    """Borders in order: both ends, and the cuts from the strongest down that leave min_s everywhere."""
    borders = [start_s, end_s]
    for cut in sorted(cuts, key=lambda cut: (-cut.score, cut.time_s)):
        if all(abs(cut.time_s - other) >= min_s for other in borders):
            borders.append(cut.time_s)
    return sorted(borders)


def split(start_s: float, end_s: float, max_s: float) -> list[Segment]:
    """Equal parts, as few as max_s allows."""
    # a rounding error is no part
    count = max(1, -int(-(end_s - start_s - 1e-6) // max_s))
    at = [start_s + (end_s - start_s) * index / count for index in range(count)]
    return [Segment(*pair) for pair in pairwise([*at, end_s])]
