"""Segments: the same whatever the spans, within the limits, and at the cuts that are there."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video import X264, write_video

from operators.find_cuts import Cut, cuts_among, find_cuts
from operators.probe_video import probe_video
from operators.settings import VideoSettings
from operators.shots import Segment, chosen, divide, grid, segments, spans, split

FPS = 10
# where the picture changes, in seconds of a video of 60 s
CUTS = (3.0, 7.5, 11.2, 12.0, 20.4, 31.0, 33.3, 47.8, 55.1)
LENGTH_S = 60.0


def asked(**changed: object) -> VideoSettings:
    return VideoSettings(**{"min_s": 2.0, "max_s": 6.0, "timeout_s": 60, **changed})


def planned(duration_s: float, cuts: Sequence[Cut], video: VideoSettings) -> list[Segment]:
    """What all spans together give, each from the cuts of its own tiles."""
    found = grid(duration_s, video)
    whole = []
    for index in range(found.spans):
        blocks = found.span(index)
        tiles = [*found.tiles(blocks)]
        known = [cut for cut in cuts if any(start <= cut.time_s < end for start, end in tiles)]
        whole += [one for block in blocks for one in divide(found, block, known, video)]
    return whole


cut_lists = st.lists(
    st.builds(Cut, st.integers(1, 4000).map(lambda tenth: tenth / 10), st.integers(6, 60)),
    max_size=150,
    unique_by=lambda cut: cut.time_s,
).map(sorted)


@settings(max_examples=150, deadline=None)
@given(
    cuts=cut_lists,
    duration_s=st.integers(1, 4000).map(lambda tenth: tenth / 10),
    segment=st.sampled_from(["shots", "fixed", "whole"]),
    max_s=st.sampled_from([1.0, 4.0, 7.3, 30.0]),
    share=st.sampled_from([0.1, 0.35, 0.5]),
)
def test_any_span_gives_the_same_segments(
    cuts: list[Cut], duration_s: float, segment: str, max_s: float, share: float
) -> None:
    video = asked(segment=segment, max_s=max_s, min_s=max_s * share)
    inside = [cut for cut in cuts if cut.time_s < duration_s]
    by_span = {
        span_s: planned(duration_s, inside, video.model_copy(update={"span_s": span_s}))
        for span_s in (30.0, 77.0, 120.0, 3600.0)
    }
    expected = by_span[3600.0]
    assert all(found == expected for found in by_span.values())
    # without holes
    assert expected[0].start_s == 0
    assert expected[-1].end_s == duration_s
    assert all(one.end_s == other.start_s for one, other in pairwise(expected))
    lengths = [end_s - start_s for start_s, end_s in expected]
    if segment == "shots":
        assert max(lengths) <= max_s + 1e-6
        # only what is short itself is shorter
        assert min(lengths) >= min(video.min_s, duration_s) - 1e-6
    if segment == "fixed":
        assert all(length == pytest.approx(max_s) for length in lengths[:-1])
        assert lengths[-1] <= max_s + 0.5 + 1e-6
    if segment == "whole":
        assert len(expected) == 1


@given(cuts=cut_lists, span_s=st.integers(30, 3600))
def test_nominal_spans_have_the_segments_that_start_in_them(cuts: list[Cut], span_s: int) -> None:
    video = asked(span_s=span_s)
    nominal = spans(400.0, video)
    found = grid(400.0, video)
    assert len(nominal) == found.spans
    assert nominal[0][0] == 0
    assert nominal[-1][1] == 400.0
    for index, (start_s, _) in enumerate(nominal):
        first = divide(found, found.span(index).start, cuts, video)[0]
        assert abs(first.start_s - start_s) <= video.max_s / 2


def test_the_strongest_cuts_come_first() -> None:
    cuts = [Cut(2.0, 10), Cut(3.0, 30), Cut(4.5, 20), Cut(9.5, 50)]
    assert chosen(0, 10, cuts, 2.0) == [0, 3.0, 10]
    assert chosen(0, 10, cuts, 1.5) == [0, 3.0, 4.5, 10]
    assert chosen(0, 10, [], 2.0) == [0, 10]


def test_splitting() -> None:
    assert split(0, 6, 6) == [Segment(0, 6)]
    assert [one.start_s for one in split(10, 20, 6)] == [10, 15]
    assert len(split(0, 18.0000001, 6)) == 3


def test_only_a_sudden_change_is_a_cut() -> None:
    def grey(level: float) -> np.ndarray:
        return np.full((27, 48, 3), level, np.uint8)

    levels = [50] * 10 + [120] * 10
    found = cuts_among([(1000 * n, grey(level)) for n, level in enumerate(levels)])
    assert [time_us for time_us, _ in found] == [10_000]
    assert found[0][1] == pytest.approx(70 / 2.55, abs=0.1)
    fade = [(1000 * n, grey(20 + 20 * n)) for n in range(10)]
    assert cuts_among(fade) == []
    assert cuts_among([(0, grey(0))]) == []
    faint = [(n, grey(50 + 10 * (n > 5))) for n in range(10)]
    assert cuts_among(faint) == []


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moving gradient whose colours change at CUTS; key frames each 4 s, not at the cuts."""
    colours = np.random.default_rng(3).integers(0, 256, (len(CUTS) + 1, 2, 3))
    across = np.linspace(0, 1, 96)[None, :, None]

    def picture(place: int) -> np.ndarray:
        shot = sum(place / FPS >= cut - 1e-6 for cut in CUTS)
        moved = np.roll(across, place % 96, axis=1)
        left, right = colours[shot]
        return (left * moved + right * (1 - moved)).astype(np.uint8).repeat(64, axis=0)

    folder = tmp_path_factory.mktemp("shots")
    pictures = [picture(place) for place in range(int(LENGTH_S * FPS))]
    fixed = ("-g", "40", "-keyint_min", "40", "-sc_threshold", "0")
    return write_video(folder / "a.mp4", pictures, *X264, *fixed, fps=FPS)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_cuts_are_found_where_they_are(shots: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    coded = ("-c", "copy") if name != "a.avi" else ("-c:v", "mpeg4", "-q:v", "2", "-g", "40")
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(shots), *coded, str(path)], check=True)
    video = asked()
    facts = probe_video(str(path), video)
    found = find_cuts(str(path), facts, 0, LENGTH_S, video)
    # pictures that no other needs are not looked at: a tick or two
    assert [cut.time_s for cut in found] == pytest.approx(CUTS, abs=0.25)
    # the same ones, whatever part is looked at
    for start_s, end_s in ((0, 9.1), (7.0, 8.0), (12.0, 40.0), (33.5, 60.0), (50.0, 55.0)):
        part = find_cuts(str(path), facts, start_s, end_s, video)
        assert part == [cut for cut in found if start_s <= cut.time_s < end_s]


def test_spans_of_a_file(shots: Path) -> None:
    facts = probe_video(str(shots), asked())
    by_span = []
    for span_s in (30, 60):
        video = asked(span_s=span_s)
        indices = range(len(spans(facts.duration_s, video)))
        by_span.append([one for at in indices for one in segments(str(shots), facts, at, video)])
    assert by_span[0] == by_span[1]
    # of 11.2 and 12.0 one must go
    starts = [one.start_s for one in by_span[0]]
    near = [min(abs(cut - start) for start in starts) < 0.25 for cut in CUTS]
    assert near.count(False) == 1


def test_a_long_shot_is_hardly_decoded(tmp_path: Path) -> None:
    """A GOP whose key frames look alike is passed over: no picture between them is asked for."""
    still = np.random.default_rng(0).integers(60, 200, (64, 96, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", [still] * 300, *X264, "-g", "50", fps=25)
    facts = probe_video(str(path), asked())
    assert find_cuts(str(path), facts, 0, 12, asked()) == []


def test_a_stream_that_starts_late_has_no_segment_before(shots: Path, tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    late = ("-itsoffset", "9", "-i", str(shots), "-c", "copy", str(path))
    subprocess.run(["ffmpeg", "-v", "error", *late], check=True)
    video = asked(segment="fixed")
    facts = probe_video(str(path), video)
    found = segments(str(path), facts, 0, video)
    assert found[0].start_s == pytest.approx(9, abs=0.1)
