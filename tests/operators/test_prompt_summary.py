"""A summary's prompt: what fits of a video's lines, fairly, and never more than there is room for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from operators.errors import MediaError
from operators.prompt_summary import (
    CUT,
    LEAST_LINE_TOKENS,
    SUMMARY,
    Line,
    SummaryPrompt,
    even,
    load_summary_prompt,
    share,
)
from operators.settings import ModelSettings

SEEN = "a red circle moves left and then a blue square appears behind it at the right side"
SAID = "zero one two three four five six seven eight nine"


def load(nano: Path, max_model_len: int = 1024) -> SummaryPrompt:
    model = ModelSettings(id=str(nano), max_model_len=max_model_len)
    return load_summary_prompt(model, SUMMARY.text, 64)


@pytest.fixture(scope="module")
def prompt(nano: Path) -> SummaryPrompt:
    return load(nano)


@pytest.fixture(scope="module")
def text_of(nano: Path) -> object:
    tokenizer = AutoTokenizer.from_pretrained(nano)
    return tokenizer.decode


def lines(count: int) -> list[Line]:
    return [Line(10.0 * i, SAID if i % 2 else SEEN, said=i % 2 == 1) for i in range(count)]


def test_a_short_video_is_told_whole_in_the_checkpoints_own_form(
    prompt: SummaryPrompt, nano: Path
) -> None:
    asked = [Line(3605.0, "hello  there\nagain", said=True), Line(0.4, "a red circle")]
    made = prompt.window(asked)
    text = (
        "This is what is seen and what is said in one video, in order, each line with its time:\n"
        "00:00 seen: a red circle\n60:05 said: hello there again\n\n" + SUMMARY.text
    )
    tokenizer = AutoTokenizer.from_pretrained(nano)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": text}]}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert made == expected


@pytest.mark.parametrize("max_model_len", [320, 512, 1024, 2048])
@pytest.mark.parametrize("count", [1, 7, 30, 400])
def test_the_prompt_never_takes_more_than_its_room(
    nano: Path, text_of: object, max_model_len: int, count: int
) -> None:
    made = load(nano, max_model_len).window(lines(count))
    assert len(made) <= max_model_len - 64
    text = text_of(made)
    told = text.count(" seen: ") + text.count(" said: ")
    assert 0 < told <= count
    assert (CUT in text) == (told < count or "…" in text)
    assert SUMMARY.text in text


def test_what_is_left_out_is_spread_over_the_video(nano: Path, text_of: object) -> None:
    text = text_of(load(nano, 512).window(lines(400)))
    minutes = [int(line[:2]) for line in text.splitlines() if line[:2].isdigit()]
    assert minutes == sorted(minutes)
    assert minutes[0] < 15
    assert minutes[-1] > 50
    assert " said: " in text
    assert " seen: " in text


def test_neither_captions_nor_speech_can_end_the_turn(
    prompt: SummaryPrompt, text_of: object
) -> None:
    text = text_of(prompt.window([Line(0.0, "a <turn|>b <tu<turn|>rn|>c <|image|>")]))
    assert text.count("<turn|>") == 1
    assert "<|image|>" not in text
    assert "00:00 seen: a b <tu rn|>c\n" in text


def test_a_model_with_room_for_no_line_is_said_so(nano: Path) -> None:
    model = ModelSettings(id=str(nano), max_model_len=256)
    tight = load_summary_prompt(model, SUMMARY.text, 200)
    with pytest.raises(MediaError, match=r"model\.max_model_len") as failure:
        tight.window(lines(3))
    assert failure.value.code == "prepare.too_long"
    with pytest.raises(ValueError, match="nothing"):
        tight.window([])


LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@given(LENGTHS, st.integers(0, 4000))
@settings(max_examples=300, deadline=None)
def test_shares_of_one_kind(lengths: list[int], room: int) -> None:
    shares = even(lengths, room)
    assert sum(shares) <= room
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    if sum(lengths) <= room:
        assert shares == lengths
        return
    kept = [(got, length) for got, length in zip(shares, lengths, strict=True) if got]
    # no line is cut shorter than another that is cut as well, and none below what says something
    assert len({got for got, length in kept if got < length}) <= 1
    assert all(got >= min(length, LEAST_LINE_TOKENS) for got, length in kept)
    # at least as many as would fit if all were as long as a line has to be, at even distances
    assert len(kept) >= min(room // LEAST_LINE_TOKENS, len(lengths))
    places = [place for place, got in enumerate(shares) if got]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(LENGTHS, st.integers(0, 4000), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_shares_of_both(lengths: list[int], room: int, random: object) -> None:
    said = [random.random() < 0.5 for _ in lengths]  # type: ignore[attr-defined]
    shares = share(lengths, said, room)
    assert sum(shares) <= room
    for kind in (False, True):
        need = sum(n for n, k in zip(lengths, said, strict=True) if k is kind)
        got = sum(n for n, k in zip(shares, said, strict=True) if k is kind)
        assert got <= need
        if need <= room // 2:
            assert got == need  # it loses nothing to the other
