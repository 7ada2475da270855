"""Summaries: texts of the ledger to a request without media."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.media_summary import Summaries
from operators.prompt_summary import SUMMARY, SummaryPrompt, load_summary_prompt
from operators.schema import PAYLOAD, PLAN, PREPARED
from operators.settings import ModelSettings


def prompt(nano: Path) -> SummaryPrompt:
    return load_summary_prompt(ModelSettings(id=str(nano)), SUMMARY.text, SUMMARY.max_tokens)


def asked(name: str, **told: Any) -> dict[str, Any]:
    material = {"captions": [], "transcript": [], "failed": None} | told
    return {"span_id": name, "track": "summary", "variables": json.dumps(material)}


def test_what_was_seen_and_said_becomes_one_request(nano: Path) -> None:
    seen = {"start_s": 61.0, "end_s": 70.0, "text": "a red circle"}
    said = {"start_s": 62.0, "end_s": 64.0, "text": "hello"}
    rows = [
        asked("a", captions=[seen], transcript=[said]),
        asked("nothing"),
        asked("failed", failed="fetch.timeout"),
        asked("long", captions=[seen] * 2000),
    ]
    stage = pickle.loads(pickle.dumps(Summaries(prompt(nano))))
    table = stage(pa.Table.from_pylist(rows, schema=PLAN))
    assert table.schema == PREPARED
    told, nothing, failed, long = table.to_pylist()
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(nano).decode(told["window_tokens"][0])
    assert "01:01 seen: a red circle" in text
    assert "01:02 said: hello" in text
    assert told["window_media"] == [b""]
    # nobody is asked about nothing, and what failed stays failed, to be asked again with the rest
    assert all(nothing[name] == [] for name in PAYLOAD)
    assert nothing["error_code"] is None
    assert (failed["error_code"], failed["window_tokens"]) == ("fetch.timeout", None)
    assert 3700 < len(long["window_tokens"][0]) <= 4096 - SUMMARY.max_tokens
