"""The engine actor's batch callable: finished tensors in, answers out.

Many calls run at once on threads of one actor; each submits its rows and waits for them, so calls x
rows is the number of requests in flight. Which rows are in the engine is written down outside the
process before they enter it (`Strikes`): when the process dies, its successor charges them, runs them
alone, and gives up a row that killed the engine twice.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from operators.decode_image import decode_image
from operators.errors import MediaError
from operators.prepare_video import unpack_video
from operators.prompts import Prompts
from operators.requests import (
    Answer,
    AudioRequest,
    ImageRequest,
    RawImageRequest,
    Request,
    TextEngine,
    TextRequest,
    VideoRequest,
)
from operators.retry import asked_again, halves, joined
from operators.schema import ANSWERS, PREPARED
from operators.settings import AudioSettings, ImageSettings
from operators.tracks import Kind, kind

MAX_STRIKES = 2


class Strikes(Protocol):
    """Remembers, outside the actor, which rows were in the engine when it died."""

    def counts(self, span_ids: Sequence[str]) -> list[int]: ...
    def begin(self, span_ids: Sequence[str]) -> None: ...
    def end(self, span_ids: Sequence[str]) -> None: ...


class Generate:
    """Batch callable: PREPARED -> ANSWERS, row for row. Owns the engine.

    `report` gets the engine's usage after each batch. Called from many threads.
    """

    def __init__(
        self,
        engine: Callable[[], TextEngine],
        prompts: Prompts,
        answer_tokens: Mapping[Kind, int],
        image: ImageSettings,
        audio: AudioSettings,
        strikes: Callable[[], Strikes],
        report: Callable[[dict[str, float]], None] = lambda usage: None,
    ) -> None:
        self._prompts = prompts
        self._answer_tokens = answer_tokens
        self._image = image
        self._translate_to = audio.translate_to
        self._report = report
        self._strikes = strikes()
        self._gate = Gate()
        self._proven = False
        self._engine = engine()

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.cast(PREPARED)
        work = [index for index, asked in enumerate(table["window_tokens"]) if asked.is_valid]
        ids = table["span_id"].take(pa.array(work, pa.int64())).to_pylist()
        strikes = dict(zip(work, self._strikes.counts(ids) if ids else [], strict=True))
        answers: dict[int, _Outcome] = {}
        clean = [index for index in work if strikes[index] == 0]
        if clean:
            with self._gate.shared():
                answers |= self._ask(table, clean)
        for index in work:
            if strikes[index] >= MAX_STRIKES:
                self._prove()
                answers[index] = _Outcome(
                    error=MediaError(
                        "generate.engine_killed",
                        f"the engine died {strikes[index]} times while this row was in it",
                    )
                )
            elif strikes[index] > 0:
                with self._gate.alone():
                    answers |= self._ask(table, [index])
        self._report(self._engine.usage())
        return _answered(table, answers)

    def close(self) -> None:
        """End the engine in order."""
        if hasattr(self, "_engine"):
            self._engine.close()

    def __del__(self) -> None:
        # Ray Data deletes the callable when it releases the actor. Ray has killed the engine's processes
        # by then; what they left behind is put away here.
        self.close()

    def _ask(self, table: pa.Table, indices: list[int]) -> dict[int, _Outcome]:
        rows = {index: _row(table, index) for index in indices}
        ids = [row["span_id"] for row in rows.values()]
        self._strikes.begin(ids)
        started = time.monotonic()
        waiting = {
            index: [(request, self._submit(request)) for request in self._requests(row)]
            for index, row in rows.items()
        }
        outcomes, again = {}, []
        for index, windows in waiting.items():
            answers = [_answer(future) for _, future in windows]
            outcomes[index] = _Outcome(answers, seconds=time.monotonic() - started)
            for place, (request, _) in enumerate(windows):
                if parts := self._once_more(request, answers[place], rows[index]):
                    again.append((outcomes[index], place, parts))
        for outcome, place, parts in again:
            answers = [_answer(part) for part in parts]
            outcome.answers[place] = joined(outcome.answers[place], answers, self._translate_to)
            outcome.seconds = time.monotonic() - started
        self._strikes.end(ids)
        self._proven = True
        return outcomes

    def _prove(self) -> None:
        """Have the engine answer something, if it has not yet: no row is to blame for a sick engine.

        One that dies of this ends the process while no row is charged. Token 0 is in any vocabulary.
        """
        if not self._proven:
            with self._gate.alone():
                self._engine.submit(TextRequest([0], 1)).result()
            self._strikes.end([])  # the deaths before were not its own
            self._proven = True

    def _once_more(
        self, request: Request | MediaError, answer: Answer, row: dict[str, Any]
    ) -> list[Future[Answer]]:
        """Speech that gave no transcript, asked again in shorter pieces."""
        if not isinstance(request, AudioRequest):
            return []
        if not asked_again(request, answer, self._translate_to):
            return []
        variables = json.loads(row["variables"] or "null")
        parts = halves(request, self._prompts["audio"], variables)
        return [self._engine.submit(part) for part in parts]

    def _submit(self, request: Request | MediaError) -> Future[Answer]:
        if not isinstance(request, MediaError):
            return self._engine.submit(request)
        failed: Future[Answer] = Future()
        failed.set_exception(request)
        return failed

    def _requests(self, row: dict[str, Any]) -> Iterator[Request | MediaError]:
        """One request a window, over views of the object store's memory."""
        asked = kind(row["track"])
        longest = self._answer_tokens[asked]
        for token_ids, media, columns, rows, media_hash in zip(
            row["window_tokens"],
            row["window_media"],
            row["window_columns"],
            row["window_rows"],
            row["window_media_hash"],
            strict=True,
        ):
            if asked == "text":
                yield TextRequest(token_ids, longest)
            elif asked == "audio":
                place = self._prompts["audio"].placeholder(token_ids)
                frames = np.frombuffer(media, dtype=np.float32).reshape(columns, -1)
                yield AudioRequest(token_ids, place, frames, media_hash, longest)
            elif asked == "video":
                prompt = self._prompts["video"]
                patches = unpack_video(media, columns, rows)
                yield VideoRequest(
                    token_ids,
                    prompt.media_id,
                    patches,
                    columns,
                    rows,
                    prompt.as_images,
                    media_hash,
                    longest,
                )
            elif columns == 0:  # render: engine
                yield self._raw_request(row, media.to_pybytes())
            else:
                place = self._prompts["image"].placeholder(token_ids)
                patches = np.frombuffer(media, dtype=np.uint8).reshape(columns * rows, -1)
                yield ImageRequest(token_ids, place, patches, columns, rows, media_hash, longest)

    def _raw_request(self, row: dict[str, Any], data: bytes) -> Request | MediaError:
        prompt = self._prompts["image"]
        try:
            pixels = decode_image(data, self._image).pixels
            rendered = prompt.raw(json.loads(row["variables"] or "{}"))
        except MediaError as error:
            return error
        return RawImageRequest(rendered, pixels, prompt.raw_media_id, self._answer_tokens["image"])


@dataclass
class _Outcome:
    answers: list[Answer] = field(default_factory=list)
    error: MediaError | None = None
    seconds: float = 0.0


class Gate:
    """Many shared holders or one alone. Who wants to be alone goes before new shared ones."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shared = 0
        self._alone = False
        self._want_alone = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._want_alone)
            self._shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._shared -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._want_alone += 1
            self._changed.wait_for(lambda: not self._alone and not self._shared)
            self._want_alone -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def _row(table: pa.Table, index: int) -> dict[str, Any]:
    names = ("span_id", "track", "variables", "window_tokens", "window_media_hash")
    row = {name: table[name][index].as_py() for name in (*names, "window_columns", "window_rows")}
    # Not as_py: that would copy megabytes of patches into bytes objects.
    row["window_media"] = [media.as_buffer() for media in table["window_media"][index].values]
    return row


def _answer(future: Future[Answer]) -> Answer:
    """A window's answer; a refusal is one as well, with its code."""
    try:
        return future.result()
    except MediaError as error:
        return Answer("", None, 0, None, 0, error.code, error.message)


def _answered(table: pa.Table, outcomes: dict[int, _Outcome]) -> pa.Table:
    columns = {name: table[name] for name in ANSWERS.names if name in table.column_names}
    errors = {name: table[name].to_pylist() for name in ANSWERS.names if name.startswith("error_")}
    answers: list[list[dict[str, Any]] | None] = [None] * table.num_rows
    seconds: list[float | None] = [None] * table.num_rows
    for index, outcome in outcomes.items():
        seconds[index] = outcome.seconds
        if outcome.error is None:
            answers[index] = [vars(answer) for answer in outcome.answers]
        else:
            for name, value in outcome.error.columns.items():
                errors[name][index] = value
    columns |= errors
    columns |= {"window_answers": answers, "generate_s": seconds}
    return pa.table([columns[name] for name in ANSWERS.names], schema=ANSWERS)
