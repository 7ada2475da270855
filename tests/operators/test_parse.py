"""Answers to fields."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from operators.errors import MediaError
from operators.parse import Parse, caption, tags
from operators.schema import ANSWERS, LEDGER, MISSING
from operators.settings import AudioSettings


def answer(text: str, finish_reason: str = "stop", output_tokens: int = 5) -> dict[str, object]:
    return {
        "text": text,
        "finish_reason": finish_reason,
        "prompt_tokens": 20,
        "media_tokens": 12,
        "output_tokens": output_tokens,
        "error_code": None,
        "error_message": None,
    }


def row(**fields: object) -> dict[str, object]:
    return {"span_id": "a-00000", "asset_id": "a", "uri": "x.jpg", "track": "image", **fields}


def parsed(*rows: dict[str, object], prompt_name: str = "caption-dense") -> list[dict[str, object]]:
    table = Parse("run-1", prompt_name, AudioSettings())(
        pa.Table.from_pylist(list(rows), schema=ANSWERS)
    )
    assert table.schema.equals(LEDGER)
    return table.to_pylist()


def test_a_whole_answer_is_ok_and_counted() -> None:
    (done,) = parsed(row(window_answers=[answer("  a red circle \n")]))
    assert (done["status"], done["text"], done["error_code"]) == ("ok", "a red circle", None)
    assert (done["prompt_tokens"], done["media_tokens"], done["output_tokens"]) == (20, 12, 5)
    assert (done["run_id"], done["sealed"]) == ("run-1", True)


def test_an_answer_of_nothing_but_space_is_empty() -> None:
    (done,) = parsed(row(window_answers=[answer(" \n")]))
    assert (done["status"], done["text"], done["sealed"]) == ("empty", "", True)


@pytest.mark.parametrize(
    ("finish_reason", "code"),
    [("length", "generate.truncated"), ("repetition", "generate.looped")],
)
def test_an_answer_that_did_not_end_is_a_failure_that_shows_its_tail(
    finish_reason: str, code: str
) -> None:
    (done,) = parsed(row(window_answers=[answer("a very " * 100, finish_reason)]))
    assert (done["status"], done["error_code"], done["error_stage"]) == ("failed", code, "generate")
    assert done["text"] is None
    assert str(done["error_message"]).endswith("a very")
    # of a video's sound and summary it would be advice to ask everything anew, and for nothing
    assert ("a video's sound and summary have their own" in str(done["error_message"])) == (
        code == "generate.truncated"
    )
    # what it cost is still counted
    assert done["output_tokens"] == 5


def test_a_row_that_failed_before_keeps_its_code_and_only_a_passing_fault_stays_unsealed() -> None:
    gone, busy = parsed(
        row(error_code="decode.corrupt", error_stage="decode", error_message="ends early"),
        row(error_code="fetch.unavailable", error_stage="fetch", error_message="503"),
    )
    assert (gone["status"], gone["error_message"], gone["sealed"]) == ("failed", "ends early", True)
    assert (busy["status"], busy["sealed"]) == ("failed", False)


def test_a_missing_file_is_asked_again_where_it_may_come_back_as_it_was() -> None:
    error = {"error_code": "fetch.not_found", "error_stage": "fetch", "error_message": "gone"}
    rows = parsed(*(row(**error, version=version) for version in ("etag", "", MISSING)))
    assert [each["sealed"] for each in rows] == [False, False, True]


def test_tags_are_structured() -> None:
    assert tags("Red circle, blue  square,\nred circle, #dog.") == [
        "red circle",
        "blue  square",
        "dog",
    ]
    (done,) = parsed(row(window_answers=[answer("Ü, b")]), prompt_name="tags")
    assert json.loads(str(done["structured"])) == ["ü", "b"]


def test_caption_raises_for_a_loop() -> None:
    with pytest.raises(MediaError, match="repeats"):
        caption([answer("x x x", "repetition")], "caption-dense")


def spoken(*answers: dict[str, object], **fields: object) -> dict[str, object]:
    starts = [10.0 * number for number in range(len(answers))]
    return row(
        **{"modality": "audio", "track": "mix", **fields},
        window_answers=list(answers),
        window_start_s=starts,
        window_end_s=[start + 8 for start in starts],
    )


def test_windows_become_one_transcript_with_times() -> None:
    (done,) = parsed(spoken(answer(" one two"), answer("[no speech]"), answer("three")))
    assert (done["status"], done["text"]) == ("ok", "one two three")
    assert done["segments"] == [
        {"start_s": 0.0, "end_s": 8.0, "text": "one two", "channel": None},
        {"start_s": 20.0, "end_s": 28.0, "text": "three", "channel": None},
    ]
    assert done["output_tokens"] == 15


def test_a_channel_of_its_own_is_named_in_its_segments() -> None:
    (done,) = parsed(spoken(answer("one"), track="c1"))
    assert [segment["channel"] for segment in done["segments"]] == [1]


def test_gaps_on_both_sides_of_a_caption_are_two() -> None:
    bad = answer("x x x", "repetition")
    (done,) = parsed(spoken(bad, answer("a dog"), bad, bad, track="frames", modality="video"))
    assert done["text"] == "a dog"
    assert done["error_message"] == (
        "not described: 0:00:00.0-0:00:08.0 generate.looped, 0:00:20.0-0:00:38.0 generate.looped"
    )


def test_captions_of_segments_keep_their_lines_and_a_failed_one_is_a_gap() -> None:
    answers = (answer("a dog\nruns "), answer("x x x", "repetition"), answer(" a cat"))
    (done,) = parsed(spoken(*answers, track="frames", modality="video"))
    assert (done["status"], done["error_code"]) == ("failed", "generate.looped")
    assert done["error_message"] == "not described: 0:00:10.0-0:00:18.0 generate.looped"
    assert done["text"] == "a dog\nruns\na cat"
    assert [(s["start_s"], s["text"]) for s in done["segments"]] == [
        (0.0, "a dog\nruns"),
        (20.0, "a cat"),
    ]
    (lost,) = parsed(spoken(answer("x", "length"), track="frames"))
    assert (lost["status"], lost["text"], lost["sealed"]) == ("failed", None, True)


def test_a_span_without_speech_is_empty_and_no_window_was_asked() -> None:
    (done,) = parsed(spoken())
    assert (done["status"], done["text"], done["output_tokens"]) == ("empty", "", 0)


def test_a_window_that_failed_is_a_gap_and_the_rest_is_kept() -> None:
    (done,) = parsed(spoken(answer("one"), answer("x", "length"), answer("three")))
    assert (done["status"], done["error_code"]) == ("failed", "generate.truncated")
    assert done["text"] == "one three"
    assert "0:00:10.0-0:00:18.0 generate.truncated" in str(done["error_message"])
    (lost,) = parsed(spoken(answer("x", "length")))
    assert (lost["status"], lost["text"]) == ("failed", None)


def test_sound_that_ends_early_is_a_gap_as_well() -> None:
    (done,) = parsed(
        spoken(answer("one"), error_stage="decode", error_message="no sound from 9.0 s to 30.0 s")
    )
    assert (done["status"], done["error_code"], done["text"]) == ("failed", "decode.corrupt", "one")
    assert "no sound from 9.0 s" in str(done["error_message"])


def test_a_refusal_is_a_failure_of_speech_and_may_stand_in_a_picture() -> None:
    refusal = "As an AI, I have no ears."
    heard, seen = parsed(spoken(answer(refusal)), row(window_answers=[answer(refusal)]))
    assert heard["error_code"] == "generate.refused"
    assert (seen["status"], seen["text"]) == ("ok", refusal)


def test_a_language_of_the_manifest_is_the_rows() -> None:
    rows = [
        spoken(answer("ja"), variables='{"lang": "German"}'),
        spoken(answer("oui"), variables='{"lang": "French"}'),
        row(track="mix", window_answers=[]),
    ]
    table = pa.Table.from_pylist(rows, schema=ANSWERS)
    done = Parse("run-1", "transcribe", AudioSettings(language="{lang}"))(table)
    assert done["language"].to_pylist() == ["German", "French", "{lang}"]


def test_a_translation_stands_beside_what_was_said() -> None:
    table = pa.Table.from_pylist(
        [spoken(answer("guten Tag\nEnglish: good day"), answer("ja"))], schema=ANSWERS
    )
    audio = AudioSettings(translate_to="English", language="German")
    (done,) = Parse("run-1", "translate", audio)(table).to_pylist()
    assert (done["text"], done["language"]) == ("guten Tag ja", "German")
    assert json.loads(done["structured"]) == [{"start_s": 0.0, "end_s": 8.0, "text": "good day"}]
