"""Windows: where a recording may be cut, and where it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.settings import AudioSettings
from operators.voice import CHUNK_SAMPLES
from operators.windows import LEAD_CHUNKS, cut, grid, loudness_db, spans

lengths = st.floats(0.1, 100_000)
widths = st.floats(2, 30)
sizes = st.sampled_from([30.0, 60.0, 120.0, 300.0, 3600.0])


@given(lengths, widths, sizes)
def test_no_window_can_be_too_long_and_none_is_turned_around(
    duration_s: float, window_s: float, span_s: float
) -> None:
    found = grid(duration_s, AudioSettings(window_s=window_s, span_s=span_s))
    assert found.longest * CHUNK_SAMPLES <= window_s * 16_000
    assert found.step + 2 * found.reach <= found.longest
    assert found.step > 2 * found.reach
    end = -(-int(duration_s * 16_000) // CHUNK_SAMPLES)
    last_earliest = 0 if found.windows == 1 else (found.windows - 1) * found.step - found.reach
    assert end - last_earliest <= found.longest
    # the last tile reaches to the end
    assert found.tile(found.windows)[1] >= end * CHUNK_SAMPLES
    if found.windows > 1:
        assert (found.windows - 1) * found.step < (duration_s + 1) * 16_000 / CHUNK_SAMPLES


@given(lengths, widths)
def test_spans_are_whole_windows_of_one_grid(duration_s: float, window_s: float) -> None:
    grids = [
        grid(duration_s, AudioSettings(window_s=window_s, span_s=span_s)) for span_s in (30, 300)
    ]
    assert len({(g.step, g.reach, g.windows, g.tiles_per_block) for g in grids}) == 1
    for found in grids:
        covered = [window for index in range(found.spans) for window in found.span(index)]
        assert covered == list(range(found.windows))


@given(lengths, sizes)
def test_spans_cover_the_recording(duration_s: float, span_s: float) -> None:
    settings = AudioSettings(span_s=span_s)
    found = spans(duration_s, settings)
    assert len(found) == grid(duration_s, settings).spans
    assert found[0][0] == 0
    assert found[-1][1] == duration_s
    assert all(left[1] == right[0] for left, right in pairwise(found))


def test_blocks_do_not_know_the_span() -> None:
    found = grid(2000, AudioSettings())
    assert found.tiles_per_block == 29
    assert list(found.blocks(range(0, 30))) == [(0, range(0, 29)), (29, range(29, 30))]
    assert list(found.blocks(range(40, 43))) == [(29, range(40, 43))]
    assert found.tile(0) == (0, 164 * CHUNK_SAMPLES)
    assert found.tile(1) == (164 * CHUNK_SAMPLES, (164 + 327) * CHUNK_SAMPLES)
    assert LEAD_CHUNKS * CHUNK_SAMPLES / 16_000 == 2.016


class Stretch:
    """A tile around boundary 1 of an hour, all speech and noise, into which a test puts pauses."""

    def __init__(self) -> None:
        self.grid = grid(3600, AudioSettings())
        self.start, end = self.grid.tile(1)
        self.nominal = self.grid.step * CHUNK_SAMPLES
        count = (end - self.start) // CHUNK_SAMPLES
        self.probabilities = np.ones(count, np.float32)
        rng = np.random.default_rng(0)
        self.samples = rng.normal(0, 0.1, count * CHUNK_SAMPLES).astype(np.float32)

    def pause(self, begin: int, chunks: int) -> None:
        """`begin`: chunks from the nominal boundary."""
        first = self.nominal // CHUNK_SAMPLES - self.start // CHUNK_SAMPLES + begin
        self.probabilities[first : first + chunks] = 0.1

    def cut(self) -> float:
        """In chunks from the nominal boundary."""
        place = cut(self.grid, 1, self.probabilities, self.samples, 0.5)
        return (place - self.nominal) / CHUNK_SAMPLES


def test_the_middle_of_the_longest_pause() -> None:
    stretch = Stretch()
    stretch.pause(5, 6)
    assert stretch.cut() == 8
    stretch.pause(-60, 11)
    assert stretch.cut() == -54.5


def test_of_equal_pauses_the_nearer_and_then_the_earlier() -> None:
    stretch = Stretch()
    stretch.pause(-40, 6)
    stretch.pause(10, 6)
    assert stretch.cut() == 13
    stretch.pause(-16, 6)
    assert stretch.cut() == -13


def test_a_pause_out_of_reach_does_not_count_and_one_at_its_edge_does_as_far_as_it_reaches() -> (
    None
):
    stretch = Stretch()
    stretch.pause(0, 5)
    stretch.pause(stretch.grid.reach + 1, 50)
    assert stretch.cut() == 2.5
    stretch.pause(stretch.grid.reach - 10, 50)
    assert stretch.cut() == stretch.grid.reach - 5


def test_without_a_pause_where_it_is_most_quiet() -> None:
    stretch = Stretch()
    quiet = stretch.nominal - stretch.start - 20_000
    stretch.samples[quiet : quiet + 1600] *= 0.01
    place = cut(stretch.grid, 1, stretch.probabilities, stretch.samples, 0.5)
    assert quiet <= place - stretch.start <= quiet + 1600


def test_where_all_is_equal_at_the_nominal_boundary() -> None:
    stretch = Stretch()
    stretch.samples[:] = 0.1
    assert abs(stretch.cut()) <= 0.25


def test_a_stream_that_ended_before() -> None:
    stretch = Stretch()
    empty = np.zeros(0, np.float32)
    assert cut(stretch.grid, 1, empty, empty, 0.5) == stretch.nominal


@pytest.mark.parametrize(("level", "decibel"), [(0.0, -90), (1.0, 0), (0.1, -20)])
def test_loudness(level: float, decibel: float) -> None:
    assert loudness_db(np.full(300, level, np.float32)).tolist() == [decibel, decibel]
