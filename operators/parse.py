"""Answers to fields: is the answer whole, is it empty, does it loop; then one ledger row a span."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from operators.errors import TRANSIENT, MediaError
from operators.prompt import VARIABLE
from operators.retry import is_refusal
from operators.schema import ANSWERS, LEDGER, MISSING
from operators.settings import AudioSettings
from operators.stitch import Heard, Segment, split_translation, stitch
from operators.tracks import channel, kind

# Enough of a bad answer to see what went wrong with it.
EXCERPT_CHARS = 200


class Parse:
    """Batch callable: ANSWERS -> LEDGER, row for row."""

    def __init__(self, run_id: str, prompt_name: str, audio: AudioSettings) -> None:
        self._run_id = run_id
        self._prompt_name = prompt_name
        self._audio = audio

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.cast(ANSWERS).to_pylist()
        return pa.Table.from_pylist([self._row(row) for row in rows], schema=LEDGER)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        answers = row.pop("window_answers")
        fields: dict[str, Any] = {}
        if row["error_code"] is None:
            fields = counts(answers)
            try:
                match kind(row["track"]):
                    case "audio":
                        fields |= transcript(row, answers, self._audio.translate_to)
                        fields["language"] = spoken_language(self._audio, row["variables"])
                    case "video":
                        fields |= captions(row, answers)
                    case _:
                        fields |= caption(answers, self._prompt_name)
            except MediaError as error:
                fields |= error.columns
        fields = {"status": "failed", **row, **fields}
        return {
            **{name: fields.get(name) for name in LEDGER.names},
            "sealed": sealed(fields["error_code"], row["version"]),
            "has_text": bool(fields.get("text")),
            "run_id": self._run_id,
            "finished_at": datetime.now(UTC),
        }


def transcript(
    row: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    translate_to: str | None,
) -> dict[str, Any]:
    """status, text and segments of a span of speech from its windows.

    A window that failed is a gap: the span is failed and says where, but keeps what it has, so that
    its asset becomes partial. A span without windows is empty: nobody spoke. With `translate_to`,
    `structured` has the translation of each window with its times. Raises MediaError where all of
    it failed.
    """
    windows, first = outcomes(row, answers, spoken=True)
    translated = []
    own = channel(row["track"])
    place = {} if own is None else {"channel": own}
    for index, window in enumerate(windows):
        if window.text is None:
            continue
        text, translation = split_translation(window.text, translate_to)
        windows[index] = replace(window, text=text)
        if translation is not None:
            times = {"start_s": window.start_s, "end_s": window.end_s}
            translated.append(times | {"text": translation} | place)
    said = stitch(windows)
    fields = with_gaps(row, first, said.segments, said.gap_message("transcribed"))
    fields["text"] = said.text
    fields["segments"] = [vars(segment) | place for segment in said.segments]
    fields["structured"] = json.dumps(translated, ensure_ascii=False) if translated else None
    return fields


def spoken_language(audio: AudioSettings, variables: str | None) -> str | None:
    """audio.language with the {variables} of the row's manifest, a JSON object."""
    given = json.loads(variables or "{}")
    return audio.language and VARIABLE.sub(lambda name: given.get(name[1], name[0]), audio.language)


def captions(row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """status, text (a line a segment) and segments of a span of a video from its windows.

    Gaps as in `transcript`.
    """
    windows, first = outcomes(row, answers)
    told = [
        Segment(window.start_s, window.end_s, text)
        for window in windows
        if (text := (window.text or "").strip())
    ]
    fields = with_gaps(row, first, told, stitch(windows).gap_message("described"))
    fields["text"] = "\n".join(segment.text for segment in told)
    fields["segments"] = [vars(segment) for segment in told]
    return fields


def outcomes(
    row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], spoken: bool = False
) -> tuple[list[Heard], MediaError | None]:
    """Each window's text or failure, in order, and the first failure."""
    windows, first = [], None
    for answer, start_s, end_s in zip(
        answers, row["window_start_s"] or (), row["window_end_s"] or (), strict=True
    ):
        text, code = answer["text"], None
        try:
            check(answer, spoken)
        except MediaError as error:
            first = first or error
            text, code = None, error.code
        windows.append(Heard(start_s, end_s, text, code))
    return windows, first


def with_gaps(
    row: Mapping[str, Any],
    first: MediaError | None,
    segments: Sequence[Segment],
    gaps: str | None,
) -> dict[str, Any]:
    """status and error of a span some of whose windows failed, the first of them with `first`."""
    if first is not None and not segments:
        raise first
    if row["error_message"] is not None:  # a part of the media is missing (operators/prepared.py)
        first = first or MediaError("decode.corrupt", row["error_message"])
    if first is None:
        return {"status": "ok" if segments else "empty"}
    messages = [text for text in (gaps, row["error_message"]) if text]
    return {"status": "failed", **MediaError(first.code, "; ".join(messages)).columns}


def sealed(code: str | None, version: str | None) -> bool:
    """Whether this is the last word on a span, so that the next run leaves it alone."""
    if code == "fetch.not_found":
        # When it comes back it is another asset. What was only missed later may come back as it was.
        return version == MISSING
    return code not in TRANSIENT


def caption(answers: Sequence[Mapping[str, Any]], prompt_name: str) -> dict[str, Any]:
    """status, text and structured of a span whose one window is answered.

    A summary of nothing has no window. Raises MediaError for an answer that loops or hit its length.
    """
    if not answers:
        return {"status": "empty", "text": ""}
    (answer,) = answers
    text: str = answer["text"].strip()
    check(answer)
    return {
        "status": "ok" if text else "empty",
        "text": text,
        "structured": json.dumps(tags(text), ensure_ascii=False) if prompt_name == "tags" else None,
    }


def check(answer: Mapping[str, Any], spoken: bool = False) -> None:
    """Raise MediaError where the engine refused, or did not end the answer of its own will.

    `spoken`: or where the model did, instead of transcribing. In a picture such words may stand.
    """
    if answer["error_code"] is not None:
        raise MediaError(answer["error_code"], answer["error_message"])
    if answer["finish_reason"] == "stop":
        if spoken and is_refusal(answer["text"]):
            raise MediaError("generate.refused", answer["text"])
        return
    tail = answer["text"].strip()[-EXCERPT_CHARS:]
    if answer["finish_reason"] == "repetition":
        raise MediaError("generate.looped", f"the answer repeats itself: ...{tail}")
    raise MediaError(
        "generate.truncated",
        f"no end after {answer['output_tokens']} tokens (sampling.max_tokens; a video's sound and summary"
        f" have their own): ...{tail}",
    )


def counts(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Token sums of a span, and the finish reason of its last window."""
    names = ("prompt_tokens", "media_tokens", "output_tokens")
    return {
        "finish_reason": answers[-1]["finish_reason"] if answers else None,
        **{name: sum(answer[name] or 0 for answer in answers) for name in names},
    }


def tags(text: str) -> list[str]:
    """The distinct tags of a comma-separated answer, in its order, lower case."""
    found = (tag.strip(" \t\n.#").lower() for tag in text.replace("\n", ",").split(","))
    return list(dict.fromkeys(tag for tag in found if tag))
