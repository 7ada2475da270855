"""An engine without a model, for tests of the plumbing: it says what it was given."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future

from operators.errors import MediaError
from operators.prompt import Prompt
from operators.requests import (
    Answer,
    AudioRequest,
    RawImageRequest,
    Request,
    TextRequest,
    VideoRequest,
)

# A rendered prompt of six tokens, without a checkpoint.
PROMPT = Prompt(
    text="say",
    rendered="",
    head=(1, 2),
    tail=(3,),
    begin_id=6,
    media_id=7,
    end_id=8,
    control_tokens=(),
    max_variable_chars=10,
    max_tokens=1000,
)


def done(answer: Answer) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_result(answer)
    return future


class EchoEngine:
    """Answers at once: a picture's grid and the mean colour of its first patch, frames of a video,
    seconds of speech, `told` for text alone.

    By media hash: `deadly` ones end the process, `refused` ones it refuses.
    """

    def __init__(
        self,
        deadly: frozenset[str] = frozenset(),
        refused: frozenset[str] = frozenset(),
    ) -> None:
        self.deadly, self.refused = deadly, refused
        self.closed = False
        self.open = self.most_open = 0
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Future[Answer]:
        if isinstance(request, TextRequest):
            return done(Answer("told", "stop", len(request.token_ids), 0, 1))
        assert not isinstance(request, RawImageRequest)
        if request.media_hash in self.deadly:
            os._exit(1)
        if request.media_hash in self.refused:
            refusal: Future[Answer] = Future()
            refusal.set_exception(MediaError("generate.rejected", "refused"))
            return refusal
        if isinstance(request, VideoRequest):
            length = request.token_ids.count(request.media_id)
            assert length == request.patches.shape[0] * request.patches.shape[1]
            text = f"{len(request.patches)} frames"
        elif isinstance(request, AudioRequest):
            _, length = request.placeholder
            assert length == len(request.frames)
            text = f"{length / 25:.0f} seconds"
        else:
            _, length = request.placeholder
            assert length == request.columns * request.rows == len(request.patches)
            red, green, blue = request.patches[0].reshape(-1, 3).mean(axis=0).round().astype(int)
            text = f"{request.columns}x{request.rows} {red} {green} {blue}"
        return done(Answer(text, "stop", len(request.token_ids), length, 3))

    def usage(self) -> dict[str, float]:
        return {"engine_s": 1.0, "idle_s": 0.5, "open_s": 0.5}

    def close(self) -> None:
        self.closed = True


class MemoryStrikes:
    """operators.generate.Strikes in this process, with a record of the calls."""

    def __init__(self, strikes: dict[str, int] | None = None) -> None:
        self.strikes = strikes or {}
        self.open: set[str] = set()
        self.begun: list[tuple[str, ...]] = []

    def counts(self, span_ids: list[str]) -> list[int]:
        return [self.strikes.get(span_id, 0) for span_id in span_ids]

    def begin(self, span_ids: list[str]) -> None:
        self.begun.append(tuple(span_ids))
        self.open |= set(span_ids)

    def end(self, span_ids: list[str]) -> None:
        self.open -= set(span_ids)
