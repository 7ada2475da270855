"""Stitching: no word is lost or said twice, and every gap is named."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from operators.stitch import Heard, Segment, clock, join, plain, split_translation, stitch


def test_windows_in_any_order_become_one_text() -> None:
    windows = [
        Heard(0.5, 8.0, " one  two\n"),
        Heard(10.0, 18.0, "two three"),
        Heard(20.0, 21.0, ""),
        Heard(22.0, 23.0, "[no speech]"),
        Heard(30.0, 40.0, "four"),
    ]
    random.Random(1).shuffle(windows)
    made = stitch(windows)
    assert made.text == "one two two three four"
    assert made.segments == [
        Segment(0.5, 8.0, "one two"),
        Segment(10.0, 18.0, "two three"),
        Segment(30.0, 40.0, "four"),
    ]
    assert made.gap_message("transcribed") is None


@given(st.lists(st.text(alphabet="ab \n\t", max_size=20), max_size=20))
def test_every_word_once_and_in_order(texts: list[str]) -> None:
    made = stitch([Heard(float(i), i + 0.9, text) for i, text in enumerate(texts)])
    assert made.text.split() == " ".join(texts).split()
    assert "  " not in made.text


def test_gaps_are_joined_where_nothing_was_said_between_them() -> None:
    made = stitch(
        [
            Heard(0, 10, "one"),
            Heard(10, 20, None, "generate.looped"),
            Heard(20, 30, None, "generate.looped"),
            Heard(30, 40, None, "decode.corrupt"),
            Heard(40, 50, "two"),
            Heard(3723.45, 3800, None, "decode.corrupt"),
            Heard(3800, 3801, "three"),
            Heard(3802, 3803, None, "decode.corrupt"),
        ]
    )
    assert made.text == "one two three"
    assert made.gap_message("transcribed") == (
        "not transcribed: 0:00:10.0-0:00:30.0 generate.looped, 0:00:30.0-0:00:40.0 decode.corrupt,"
        " 1:02:03.4-1:03:20.0 decode.corrupt, 1:03:22.0-1:03:23.0 decode.corrupt"
    )


def test_many_gaps_are_counted() -> None:
    windows = [Heard(i, i + 1, None, f"generate.{i}") for i in range(7)]
    message = stitch(windows).gap_message("transcribed")
    assert message is not None
    assert message.endswith("generate.4 and 2 more")
    assert stitch(windows).text == ""


def test_nothing_at_all() -> None:
    assert stitch([]).text == ""
    assert stitch([]).segments == []


def test_scripts_without_spaces_are_joined_without() -> None:
    assert join(["今日は", "いい天気"]) == "今日はいい天気"
    assert join(["今日は", "Berlin", "まで"]) == "今日は Berlin まで"
    assert join(["안녕", "하세요"]) == "안녕 하세요"
    assert plain(" a \u00a0 b ") == "a b"


def test_translations_are_taken_apart() -> None:
    assert split_translation("Guten  Tag\nFrench: Bon jour ", "French") == ("Guten Tag", "Bon jour")
    assert split_translation("Guten Tag", "French") == ("Guten Tag", None)
    assert split_translation("Guten  Tag\nFrench: Bon jour", None)[1] is None


def test_clock() -> None:
    assert clock(0) == "0:00:00.0"
    assert clock(59.96) == "0:01:00.0"
    assert clock(100 * 3600 + 61.2) == "100:01:01.2"
