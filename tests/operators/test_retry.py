"""A window of speech that gave no transcript gets one more try, in halves."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import PROMPT

from operators.requests import Answer, AudioRequest
from operators.retry import DOUBTED_FRAMES, asked_again, halves, is_refusal, joined, went_wrong


def request(frames: np.ndarray) -> AudioRequest:
    ids = PROMPT.window(len(frames))
    return AudioRequest(ids, PROMPT.placeholder(ids), frames, "hash")


def test_halves_part_in_the_silence_nearest_to_the_middle() -> None:
    frames = np.ones((20, 640), np.float32)
    frames[[2, 3, 7, 8, 13, 14]] = 0
    left, right = halves(request(frames), PROMPT, None)
    assert (len(left.frames), len(right.frames)) == (8, 12)
    assert left.placeholder[1] == 8
    assert left.media_hash != right.media_hash
    assert np.array_equal(np.concatenate([left.frames, right.frames]), frames)


def test_running_speech_is_parted_between_words() -> None:
    """Words of 0.4 s on a faint noise, 80 ms between them: none is cut in two."""
    draw = np.random.default_rng(0)
    words = np.arange(84) % 12 < 10
    levels = np.where(words, 0.2, 0.002).astype(np.float32)
    frames = (draw.standard_normal((84, 640)) * levels[:, None]).astype(np.float32)
    left, right = halves(request(frames), PROMPT, None)
    assert len(left.frames) % 12 == 11
    assert 21 < len(left.frames) < 63
    assert np.array_equal(np.concatenate([left.frames, right.frames]), frames)
    # a short stretch is parted as well
    assert [len(part.frames) for part in halves(request(frames[:2]), PROMPT, None)] == [1, 1]
    assert [len(part.frames) for part in halves(request(frames[:3]), PROMPT, None)] == [1, 2]


def test_without_silence_the_middle_parts_them_and_one_frame_is_not_parted() -> None:
    left, right = halves(request(np.ones((21, 640), np.float32)), PROMPT, None)
    assert (len(left.frames), len(right.frames)) == (10, 11)
    assert halves(request(np.ones((1, 640), np.float32)), PROMPT, None) == []


def answer(text: str, reason: str = "stop") -> Answer:
    return Answer(text, reason, 10, 4, 3)


def test_two_good_halves_replace_the_whole_and_all_tokens_count() -> None:
    whole = answer("la la la", "repetition")
    mended = joined(whole, [answer("one"), answer(" two ")], None)
    assert (mended.text, mended.finish_reason, mended.output_tokens) == ("one two", "stop", 9)
    still = joined(whole, [answer("one"), answer("x", "length")], None)
    assert (still.text, still.finish_reason) == ("la la la", "repetition")
    assert joined(whole, [], None) is whole


def test_what_was_heard_is_not_taken_for_silence_where_a_half_went_wrong() -> None:
    whole = answer("[no speech]")
    looped = joined(whole, [answer("one"), answer("la la la", "repetition")], None)
    assert (looped.text, looped.finish_reason, looped.output_tokens) == (
        "la la la",
        "repetition",
        9,
    )
    refused = Answer("", None, 0, None, 0, "generate.rejected", "too long")
    assert joined(whole, [refused, answer("two")], None).error_code == "generate.rejected"


def test_a_half_in_which_nobody_speaks_adds_no_words() -> None:
    whole = answer("[no speech]")
    assert joined(whole, [answer("[no speech]"), answer("two")], None).text == "two"
    assert joined(whole, [answer("[no speech]"), answer("")], None).text == ""


def test_halves_of_a_translation_are_joined_language_by_language() -> None:
    parts = [answer("eins zwei\nEnglish: one two"), answer("drei\nEnglish: three")]
    mended = joined(answer("", "length"), parts, "English")
    assert mended.text == "eins zwei drei\nEnglish: one two three"
    assert joined(answer("", "length"), [answer("eins"), answer("")], "English").text == "eins"


def test_no_speech_is_doubted_where_somebody_was_heard_for_a_second() -> None:
    frames = np.zeros((60, 640), np.float32)
    frames[10 : 10 + DOUBTED_FRAMES] = 0.1
    for said in ("", "[no speech]", " [no speech]\n"):
        assert asked_again(request(frames), answer(said), None)
    assert asked_again(request(frames), answer("\nEnglish: "), "English")
    assert not asked_again(request(frames), answer("one"), None)
    refused = Answer("", None, 0, None, 0, "generate.rejected", "too long")
    assert not asked_again(request(frames), refused, None)
    frames[10] = 0
    assert not asked_again(request(frames), answer("[no speech]"), None)
    assert asked_again(request(frames), answer("la la", "repetition"), None)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I am unable to process this audio.", True),
        ("As an AI, I have no ears.", True),
        ("As an AI language model I cannot listen.", True),
        ("She has worked as an AI researcher for ten years.", False),
        ("I'm sorry, I can't hear you.", False),
        ("We were unable to process the order.", False),
        ("as an ai " * 40, False),
    ],
)
def test_refusals_are_an_assistants_words_and_not_peoples(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused
    assert went_wrong(answer(text)) is refused
