"""Sampling: how many moments of a segment, and which."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.sample_frames import sample_times


def test_one_a_second() -> None:
    assert sample_times(10, 14, 1.0, 32) == [10.5, 11.5, 12.5, 13.5]
    assert sample_times(0, 4, 0.5, 32) == [1, 3]


def test_at_least_one() -> None:
    assert sample_times(2, 2.1, 1.0, 32) == [2.05]


def test_the_cap_spreads_them() -> None:
    times = sample_times(0, 3600, 1.0, 32)
    assert len(times) == 32
    assert times[0] == 3600 / 64


def test_nothing_has_no_frames() -> None:
    with pytest.raises(ValueError, match="no frames"):
        sample_times(3, 3, 1.0, 32)


@given(
    st.floats(0, 1e5),
    st.floats(0.01, 1e4),
    st.floats(0.01, 30),
    st.integers(1, 32),
)
def test_even_inside_and_not_too_many(start: float, length: float, fps: float, most: int) -> None:
    times = sample_times(start, start + length, fps, most)
    assert 1 <= len(times) <= most
    assert len(times) <= max(1, length * fps + 0.501)
    assert start <= times[0]
    assert times[-1] < start + length
    steps = [later - earlier for earlier, later in pairwise(times)]
    assert all(step == pytest.approx(length / len(times), rel=1e-3, abs=1e-6) for step in steps)
