"""Answers to fields: is the answer whole, is it empty, does it loop; then one ledger row a span."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from operators.errors import FAILURES, MediaError
from operators.schema import ANSWERS, LEDGER

# Enough of a bad answer to see what went wrong with it.
EXCERPT_CHARS = 200


class Parse:
    """Batch callable: ANSWERS -> LEDGER, row for row."""

    def __init__(self, run_id: str, prompt_name: str) -> None:
        self._run_id = run_id
        self._prompt_name = prompt_name

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.cast(ANSWERS).to_pylist()
        return pa.Table.from_pylist([self._row(row) for row in rows], schema=LEDGER)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        answers = row.pop("window_answers")
        fields: dict[str, Any] = {"status": "failed"}
        if row["error_code"] is None:
            fields |= counts(answers)
            try:
                fields |= caption(answers, self._prompt_name)
            except MediaError as error:
                row |= {
                    "error_code": error.code,
                    "error_stage": error.stage,
                    "error_message": error.message,
                }
        return {
            **{name: row.get(name) for name in LEDGER.names},
            **fields,
            "sealed": sealed(row["error_code"], row["version"]),
            "run_id": self._run_id,
            "finished_at": datetime.now(UTC),
        }


def sealed(code: str | None, version: str | None) -> bool:
    """Whether this is the last word on a span, so that the next run leaves it alone."""
    if code == "fetch.not_found" and version:
        return True  # if it comes back, it does so with another version, as another asset
    return code is None or not FAILURES[code].transient


def caption(answers: Sequence[Mapping[str, Any]], prompt_name: str) -> dict[str, Any]:
    """status, text and structured of a span whose one window is answered.

    Raises MediaError for an answer that loops or hit its length.
    """
    (answer,) = answers
    text: str = answer["text"].strip()
    check(answer)
    return {
        "status": "ok" if text else "empty",
        "text": text,
        "structured": json.dumps(tags(text), ensure_ascii=False) if prompt_name == "tags" else None,
    }


def check(answer: Mapping[str, Any]) -> None:
    """Raise MediaError where the engine refused, or did not end the answer of its own will."""
    if answer["error_code"] is not None:
        raise MediaError(answer["error_code"], answer["error_message"])
    if answer["finish_reason"] == "stop":
        return
    tail = answer["text"].strip()[-EXCERPT_CHARS:]
    if answer["finish_reason"] == "repetition":
        raise MediaError("generate.looped", f"the answer repeats itself: ...{tail}")
    raise MediaError(
        "generate.truncated",
        f"no end after {answer['output_tokens']} tokens (sampling.max_tokens): ...{tail}",
    )


def counts(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Token sums of a span, and the finish reason of its last window."""
    names = ("prompt_tokens", "media_tokens", "output_tokens")
    return {
        "finish_reason": answers[-1]["finish_reason"],
        **{name: sum(answer[name] or 0 for answer in answers) for name in names},
    }


def tags(text: str) -> list[str]:
    """The distinct tags of a comma-separated answer, in its order, lower case."""
    found = (tag.strip(" \t\n.#").lower() for tag in text.replace("\n", ",").split(","))
    return list(dict.fromkeys(tag for tag in found if tag))
