"""Cuts: where a recording is divided into windows, as a pure function of the file and the settings.

    grid      boundary k lies near k * step (0.7 of audio.window_s), and is moved by at most 0.15
              of it into the best pause: no window is longer than audio.window_s
    tile k    the step around boundary k: the stretch whose voice activity decides its cut, always
              computed over the same samples from a clean state
    block     some tiles in a row that are always decoded in one go (decode_audio.py)
    span      some windows in a row: a row of work

Nothing here knows the span, so two workers find the same cut where their spans meet, and a
transcript does not depend on the size of spans. Positions are chunks of 512 samples, 32 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from operators.frames import SAMPLE_RATE_HZ, Waveform
from operators.settings import AudioSettings
from operators.voice import CHUNK_SAMPLES, FAINT, Probabilities

STEP = 0.7
REACH = 0.15
# Voice activity and codecs have forgotten how they started after so long: 63 chunks, 2.016 s.
LEAD_CHUNKS = 63
# Where the detector started decides about faint words, one in 5000 of isolated ones among music and
# noise: it listens twice, the second time from a second ahead.
LEADS = (LEAD_CHUNKS, 32)
BLOCK_S = 300.0
# A stream may be longer by so much than its header says, and still fit into its last window.
SLACK_S = 0.5
# Loudness is read at 8 ms, and averaged over 96: as long as the gap between two words.
HOP_SAMPLES = 128
HOPS_A_CHUNK = CHUNK_SAMPLES // HOP_SAMPLES
SMOOTH_HOPS = 12
# A pause is at least so long, 128 ms; shorter ones are inside of words.
PAUSE_CHUNKS = 4
FLOOR_DB = -90.0


@dataclass(frozen=True)
class Grid:
    """The nominal boundaries of one recording; all but `windows` in chunks.

    Boundary 0 is the start of the stream, boundary `windows` its end.
    """

    step: int
    reach: int
    longest: int
    windows: int
    windows_per_span: int
    tiles_per_block: int

    @property
    def spans(self) -> int:
        return -(-self.windows // self.windows_per_span)

    def span(self, index: int) -> range:
        """The windows of a span."""
        first = index * self.windows_per_span
        return range(first, min(first + self.windows_per_span, self.windows))

    def tile(self, boundary: int) -> tuple[int, int]:
        """[first, last) sample of the stretch around a boundary."""
        first = boundary * self.step - self.step // 2
        return max(0, first) * CHUNK_SAMPLES, (first + self.step) * CHUNK_SAMPLES

    def blocks(self, tiles: range) -> Iterator[tuple[int, range]]:
        """(tile that a block starts with, tiles wanted of it), for neighbouring tiles."""
        tile = tiles.start
        while tile < tiles.stop:
            start = tile - tile % self.tiles_per_block
            stop = min(start + self.tiles_per_block, tiles.stop)
            yield start, range(tile, stop)
            tile = stop


def grid(duration_s: float, settings: AudioSettings) -> Grid:
    """The grid of a recording whose sound ends at duration_s of its time line."""
    longest = int(settings.window_s * SAMPLE_RATE_HZ / CHUNK_SAMPLES)
    step, reach = int(longest * STEP), int(longest * REACH)
    chunks = -(-int((duration_s + SLACK_S) * SAMPLE_RATE_HZ) // CHUNK_SAMPLES)
    step_s = step * CHUNK_SAMPLES / SAMPLE_RATE_HZ
    return Grid(
        step=step,
        reach=reach,
        longest=longest,
        windows=1 if chunks <= longest else 1 + -(-(chunks - longest + reach) // step),
        windows_per_span=max(1, round(settings.span_s / step_s)),
        tiles_per_block=max(1, round(BLOCK_S / step_s)),
    )


def spans(duration_s: float, settings: AudioSettings) -> list[tuple[float, float]]:
    """Nominal (start_s, end_s) of each span. The cuts lie within 0.15 * window_s of them."""
    found = grid(duration_s, settings)
    step_s = found.step * CHUNK_SAMPLES / SAMPLE_RATE_HZ
    starts = [found.span(index).start * step_s for index in range(found.spans)]
    return list(pairwise([*starts, duration_s]))


def cut(
    grid: Grid, boundary: int, probabilities: Probabilities, samples: Waveform, threshold: float
) -> int:
    """The sample at which a boundary cuts; its tile's probabilities and samples decide.

    The middle of the longest pause in reach; without one, where it is most quiet and least like
    speech for a tenth of a second. Of equal places the one next to the nominal boundary, then the
    earlier one. Only for boundaries inside the stream.
    """
    tile_start, _ = grid.tile(boundary)
    nominal = boundary * grid.step - tile_start // CHUNK_SAMPLES
    first, last = nominal - grid.reach, min(nominal + grid.reach, len(probabilities))
    if last <= first:  # the stream ends before: nothing to cut
        return tile_start + nominal * CHUNK_SAMPLES
    pauses = _pauses(probabilities[first:last] < FAINT * threshold)
    if pauses:
        start, end = min(
            pauses,
            key=lambda run: (run[0] - run[1], abs(run[0] + run[1] - 2 * (nominal - first)), run),
        )
        # in half chunks, so that the middle is exact
        return tile_start + (2 * first + start + end) * CHUNK_SAMPLES // 2
    loud = loudness_db(samples[first * CHUNK_SAMPLES : last * CHUNK_SAMPLES])
    score = loud + 20 * np.repeat(probabilities[first:last], HOPS_A_CHUNK)[: len(loud)]
    if len(score) < SMOOTH_HOPS:
        return tile_start + nominal * CHUNK_SAMPLES
    mean = np.round(np.convolve(score, np.ones(SMOOTH_HOPS), "valid") / SMOOTH_HOPS)
    places = np.flatnonzero(mean == mean.min()) + SMOOTH_HOPS // 2
    middle = (nominal - first) * HOPS_A_CHUNK
    best: int = min(places.tolist(), key=lambda place: (abs(place - middle), place))
    return tile_start + first * CHUNK_SAMPLES + best * HOP_SAMPLES


def loudness_db(samples: Waveform) -> npt.NDArray[np.float64]:
    """Whole dB of each 8 ms, silence at -90."""
    hops = samples[: len(samples) // HOP_SAMPLES * HOP_SAMPLES].reshape(-1, HOP_SAMPLES)
    power = np.mean(np.square(hops, dtype=np.float64), axis=1)
    decibel: npt.NDArray[np.float64] = np.round(10 * np.log10(power + 10 ** (FLOOR_DB / 10)))
    return decibel


def _pauses(quiet: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[first, last) of each run long enough."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], quiet, [False])).astype(np.int8)))
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, end) for start, end in runs if end - start >= PAUSE_CHUNKS]
