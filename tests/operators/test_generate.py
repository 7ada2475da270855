"""The engine actor's callable, over an engine without a model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import media
import numpy as np
import pyarrow as pa
import pytest
from fakes import PROMPT, EchoEngine, MemoryStrikes, done

from operators.errors import MediaError
from operators.generate import Gate, Generate
from operators.prompt import Prompt
from operators.requests import Answer, AudioRequest, Request, TextRequest
from operators.schema import ANSWERS, PREPARED
from operators.settings import AudioSettings, ImageSettings


def row(name: str, columns: int = 2, rows: int = 1, **fields: object) -> dict[str, object]:
    patches = np.full((columns * rows, 6912), 100, np.uint8)
    return {
        "span_id": name,
        "track": "image",
        "asset_id": name,
        "window_tokens": [PROMPT.window(columns * rows)],
        "window_media": [patches.tobytes()],
        "window_columns": [columns],
        "window_rows": [rows],
        "window_media_hash": [name],
        **fields,
    }


def table(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PREPARED)


def generate(engine: EchoEngine, strikes: MemoryStrikes, prompt: Prompt = PROMPT) -> Generate:
    return Generate(
        lambda: engine,
        {"image": prompt, "audio": prompt},
        {"image": 9, "audio": 9},
        ImageSettings(),
        AudioSettings(),
        lambda: strikes,
    )


def test_rows_come_back_in_order_and_without_their_payload() -> None:
    strikes = MemoryStrikes()
    out = generate(EchoEngine(), strikes)(table(row("a"), row("b", 3, 2)))
    assert out.schema.equals(ANSWERS)
    first, second = out.to_pylist()
    assert (first["span_id"], first["window_answers"][0]["text"]) == ("a", "2x1 100 100 100")
    assert second["window_answers"][0]["media_tokens"] == 6
    assert second["window_answers"][0]["prompt_tokens"] == 6 + 2 + 3
    assert strikes.begun == [("a", "b")]
    assert strikes.open == set()


def test_a_row_that_failed_before_passes_by_and_one_that_is_refused_costs_only_itself() -> None:
    failed = row("a", error_code="decode.corrupt", error_stage="decode", error_message="m")
    failed |= {name: None for name in PREPARED.names if name.startswith("window_")}
    engine = EchoEngine(refused=frozenset({"b"}))
    out = generate(engine, MemoryStrikes())(table(failed, row("b"), row("c"))).to_pylist()
    assert [r["error_code"] for r in out] == ["decode.corrupt", None, None]
    assert out[0]["window_answers"] is None
    assert out[1]["window_answers"][0]["error_code"] == "generate.rejected"
    assert out[2]["window_answers"][0]["error_code"] is None


class DeafEngine(EchoEngine):
    """Hears nothing in a window of more than 40 frames, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def submit(self, request: Request) -> Future[Answer]:
        assert isinstance(request, AudioRequest)
        self.asked.append(len(request.frames))
        if len(request.frames) > 40:
            return done(Answer("[no speech]", "stop", 0, len(request.frames), 3))
        return super().submit(request)


def test_speech_that_gave_no_words_is_asked_again_in_halves() -> None:
    frames = np.ones((200, 640), np.float32)
    frames[100:150] = 0
    windows = [frames[25:75], frames[50:126], frames[:25]]
    engine = DeafEngine()
    asked = row(
        "a",
        track="mix",
        window_tokens=[PROMPT.window(len(window)) for window in windows],
        window_media=[window.tobytes() for window in windows],
        window_columns=[len(window) for window in windows],
        window_rows=[1] * len(windows),
        window_media_hash=["x", "y", "z"],
    )
    (out,) = generate(engine, MemoryStrikes())(table(asked)).to_pylist()
    said = [answer["text"] for answer in out["window_answers"]]
    # the second window is parted in its pause; its first half is still too long, and adds no words
    assert said == ["1 seconds 1 seconds", "1 seconds", "1 seconds"]
    assert engine.asked == [50, 76, 25, 25, 25, 51, 25]
    assert [answer["media_tokens"] for answer in out["window_answers"]] == [100, 152, 25]


def test_a_suspect_runs_alone_and_two_strikes_end_a_row() -> None:
    strikes = MemoryStrikes({"b": 1, "c": 2})
    out = generate(EchoEngine(), strikes)(table(row("a"), row("b"), row("c"), row("d"))).to_pylist()
    assert strikes.begun == [("a", "d"), ("b",)]
    assert [r["error_code"] for r in out] == [None, None, "generate.engine_killed", None]


def test_a_row_is_only_given_up_by_an_engine_that_answers() -> None:
    asked: list[Request] = []

    class Sick(EchoEngine):
        def submit(self, request: Request) -> Future[Answer]:
            asked.append(request)
            raise SystemExit("the engine died")

    strikes = MemoryStrikes({"a": 2})
    with pytest.raises(SystemExit):
        generate(Sick(), strikes)(table(row("a")))
    assert (asked, strikes.begun) == ([TextRequest([0], 1)], [])


def test_an_error_that_is_not_the_rows_own_stops_the_call() -> None:
    class Broken(EchoEngine):
        def submit(self, request: object) -> object:  # type: ignore[override]
            raise RuntimeError("no engine")

    with pytest.raises(RuntimeError, match="no engine"):
        generate(Broken(), MemoryStrikes())(table(row("a")))


def test_many_calls_run_at_once() -> None:
    barrier = threading.Barrier(4, timeout=10)

    class Slow(EchoEngine):
        def submit(self, request: object) -> object:  # type: ignore[override]
            barrier.wait()
            return super().submit(request)  # type: ignore[arg-type]

    call = generate(Slow(), MemoryStrikes())
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(call, [table(row(name)) for name in "abcd"]))
    assert [out["span_id"][0].as_py() for out in outs] == list("abcd")


def test_the_engine_is_closed_with_the_callable() -> None:
    engine = EchoEngine()
    call = generate(engine, MemoryStrikes())
    call.close()
    assert engine.closed


def test_alone_means_alone() -> None:
    gate, inside, most = Gate(), [], []

    def work(alone: bool) -> None:
        with gate.alone() if alone else gate.shared():
            inside.append(alone)
            most.append((alone, len(inside)))
            time.sleep(0.002)
            inside.remove(alone)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [number % 5 == 0 for number in range(100)]))
    assert max(count for alone, count in most if alone) == 1
    assert max(count for alone, count in most if not alone) > 1


def test_a_media_error_survives_a_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(MediaError("fetch.timeout", "slow")))
    assert (error.code, error.message) == ("fetch.timeout", "slow")


def test_render_engine_decodes_for_the_engines_own_processor() -> None:
    seen = []

    class Raw(EchoEngine):
        def submit(self, request: object) -> object:  # type: ignore[override]
            seen.append(request)
            return done(Answer("x", "stop", 5, None, 1))

    picture = media.encode(media.photo(30, 20), "PNG")
    raw = {"window_tokens": [[]], "window_columns": [0], "window_rows": [0]}
    here = '{"place": "here"}'
    good = row("a", **{**raw, "window_media": [picture]}, variables=here)
    bad = row("b", **{**raw, "window_media": [picture[:200]]}, variables=here)
    wordy = row("c", **{**raw, "window_media": [picture]}, variables='{"place": "far too long"}')
    call = generate(Raw(), MemoryStrikes(), replace(PROMPT, text="Say {place}"))
    codes = {}
    for out in call(table(good, bad, wordy)).to_pylist():
        (answer,) = out["window_answers"]
        assert answer["media_tokens"] is None
        codes[out["span_id"]] = answer["error_code"]
    assert codes == {"a": None, "b": "decode.corrupt", "c": "prepare.bad_variable"}
    assert seen[0].pixels.shape == (20, 30, 3)
