"""What goes to an engine and what comes back: plain values, and the interface between.

`max_tokens` of a request is the longest answer; None: as the engine was told.

operators/engine.py is vLLM behind it, tests/fakes.py an engine without a model.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class ImageRequest:
    """One image and its prompt. `patches` is uint8 [columns * rows, 6912]."""

    token_ids: list[int]
    placeholder: tuple[int, int]
    patches: np.ndarray
    columns: int
    rows: int
    media_hash: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class AudioRequest:
    """One window of speech and its prompt. `frames` is float32 [t, 640] at 16 kHz."""

    token_ids: list[int]
    placeholder: tuple[int, int]
    frames: np.ndarray
    media_hash: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class VideoRequest:
    """One segment's frames and its prompt. `patches` is uint8 [frames, columns * rows, 6912].

    `media_id` is the token that stands for each patch in `token_ids`, frame after frame.
    """

    token_ids: list[int]
    media_id: int
    patches: np.ndarray
    columns: int
    rows: int
    # the frames are images to the engine, each of its own
    as_images: bool
    media_hash: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class TextRequest:
    """A prompt without media."""

    token_ids: list[int]
    max_tokens: int | None = None


@dataclass(frozen=True)
class RawImageRequest:
    """One image, uint8 [h, w, 3], and a rendered prompt, for the engine's own processor.

    `media_id` is the token that it expands, None where the checkpoint names none.
    """

    prompt: str
    pixels: np.ndarray
    media_id: int | None
    max_tokens: int | None = None


Request = ImageRequest | AudioRequest | VideoRequest | TextRequest | RawImageRequest


@dataclass(frozen=True)
class Answer:
    """What the engine said. `finish_reason` is stop, length or repetition; None where it refused."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    # None: the engine's own processor expanded a placeholder that nobody named
    media_tokens: int | None
    output_tokens: int
    error_code: str | None = None
    error_message: str | None = None


class TextEngine(Protocol):
    """What operators/generate.py needs of an engine. `submit` is called from many threads."""

    def submit(self, request: Request) -> Future[Answer]: ...
    def usage(self) -> dict[str, float]: ...
    def close(self) -> None: ...
