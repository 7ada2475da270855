"""Subtitles: readable lines, sensible times, every word, and text that cannot break the file."""

from __future__ import annotations

import re
import subprocess
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.stitch import Segment
from operators.subtitles import Cue, cues, srt, webvtt

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of"
    " foolishness, it was the epoch of belief, it was the epoch of incredulity"
)


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in line)


def check(made: list[Cue]) -> None:
    for cue in made:
        assert 1 <= len(cue.lines) <= 2
        assert all(0 < width(line) <= 42 for line in cue.lines)
        assert cue.end_s - cue.start_s <= 7 + 1e-6
    for left, right in pairwise(made):
        assert left.start_s <= left.end_s <= right.start_s


def test_a_segment_is_shared_out_by_its_words() -> None:
    made = cues([Segment(10, 22, TEXT)])
    check(made)
    assert " ".join(" ".join(cue.lines) for cue in made) == TEXT
    assert made[0].start_s == 10
    assert made[-1].end_s == 22
    assert all(1 <= cue.end_s - cue.start_s <= 7 for cue in made)
    assert len(made) == 2


def test_an_answer_that_rambles_on_is_cut_at_once() -> None:
    rambled = " ".join([TEXT] * 80)  # took minutes
    made = cues([Segment(0, 15, rambled)])
    check(made)
    assert " ".join(" ".join(cue.lines) for cue in made) == rambled


def test_a_short_segment_is_one_cue_of_a_second() -> None:
    assert cues([Segment(3, 3.2, "Yes.")]) == [Cue(3, 4, ("Yes.",))]
    assert cues([Segment(3, 3.2, "Yes."), Segment(3.5, 9, "No.")])[0] == Cue(3, 3.5, ("Yes.",))


def test_few_words_in_a_long_time_do_not_stand_for_ever() -> None:
    check(cues([Segment(0, 15, "Well.")]))
    made = cues([Segment(0, 14, "one two three")])
    check(made)
    assert len(made) >= 2


def test_two_lines_are_about_equal() -> None:
    (cue,) = cues([Segment(0, 5, "It was the best of times, it was the worst of times")])
    assert cue.lines == ("It was the best of times,", "it was the worst of times")


segments = st.lists(
    st.tuples(
        st.floats(0, 3), st.floats(0.1, 15), st.text(alphabet="abc    é漢字<&>-", max_size=200)
    ),
    max_size=6,
)


@given(segments)
def test_whatever_is_said(drawn: list[tuple[float, float, str]]) -> None:
    place, given_segments = 0.0, []
    for gap_s, duration_s, text in drawn:
        place += gap_s
        given_segments.append(Segment(place, place + duration_s, text))
        place += duration_s
    made = cues(given_segments)
    check(made)
    said = "".join("".join(cue.lines) for cue in made)
    wanted = "".join(segment.text for segment in given_segments)
    assert re.sub(r"\s", "", said) == re.sub(r"\s", "", wanted)


@pytest.mark.parametrize("syllable", ["ที่", "हि", "e\u0301"])
def test_no_line_begins_with_a_mark_of_the_letter_before_it(syllable: str) -> None:
    """42 letters fill a line, however many marks are above and below them."""
    made = cues([Segment(0, 10, syllable * 101)])
    lines = [line for cue in made for line in cue.lines]
    assert "".join(lines) == syllable * 101
    assert all(line.startswith(syllable) for line in lines)
    assert len(cues([Segment(0, 5, "e\u0301" * 42)])[0].lines) == 1


@pytest.mark.parametrize("text", ["a -->", "a ---> b", "a ------> b"])
def test_no_arrow_is_left_in_a_text(text: str) -> None:
    made = [Cue(0, 1, (text,))]
    assert srt(made).count("-->") == webvtt(made).count("-->") == 1


def test_the_files() -> None:
    made = [Cue(0, 1.5, ("a < b & c --> d",)), Cue(3661.0004, 360_002, ("two", "lines"))]
    assert webvtt(made) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\na &lt; b &amp; c --&gt; d\n\n"
        "01:01:01.000 --> 100:00:02.000\ntwo\nlines\n"
    )
    assert srt(made) == (
        "1\n00:00:00,000 --> 00:00:01,500\na < b & c -> d\n\n"
        "2\n01:01:01,000 --> 100:00:02,000\ntwo\nlines\n"
    )
    assert webvtt([]) == "WEBVTT\n"
    assert srt([]) == ""


def test_ffmpeg_reads_them(tmp_path: Path) -> None:
    made = cues([Segment(1, 13, TEXT), Segment(14, 16, "a < b --> c")])
    for name, text in (("a.vtt", webvtt(made)), ("a.srt", srt(made))):
        (tmp_path / name).write_text(text)
        out = subprocess.run(
            ["ffprobe", "-v", "error", "-show_packets", "-of", "csv", str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert len(out.splitlines()) == len(made)
