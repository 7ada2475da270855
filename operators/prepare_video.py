"""A segment's frames to patches and times: what one request about a video needs.

The values are those of transformers' Gemma4UnifiedVideoProcessor before its 1/255, which treats each
frame as a picture. All frames of a segment have one size, so one grid says where their patches lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from operators.errors import MediaError
from operators.patchify import PATCH_VALUES, patchify
from operators.prepare_image import media_hash
from operators.settings import VideoSettings

# vLLM's video item is made for so many patches a frame (_VIDEO_MAX_SOFT_TOKENS in gemma4_mm.py):
# larger frames travel as images.
ITEM_SOFT_TOKENS = 70

Pixels = npt.NDArray[np.uint8]


class PreparedVideo(NamedTuple):
    """patches: uint8 [frames, columns * rows, 6912], C-contiguous. stamps_s: a time before each frame."""

    patches: Pixels
    columns: int
    rows: int
    stamps_s: list[float]
    media_hash: str

    @property
    def media(self) -> memoryview:
        """The patches as one buffer, for window_media; `unpack_video` reads it."""
        return self.patches.data.cast("B")


def prepare_video(
    frames: Sequence[Pixels],
    times_s: Sequence[float],
    start_s: float,
    settings: VideoSettings,
    shown: tuple[int, int] | None = None,
) -> PreparedVideo:
    """Frames, uint8 [height, width, 3] each, at times of the source, of the segment from `start_s` on.

    `shown` is (height, width) of the whole picture where the decoder has scaled it (see patchify).
    Raises MediaError: decode.corrupt for frames of several sizes, prepare.aspect_ratio; ValueError for
    no frames, or another number of times.
    """
    if not frames or len(frames) != len(times_s):
        raise ValueError(f"{len(frames)} frames and {len(times_s)} times")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise MediaError("decode.corrupt", "the picture changes its size within a segment")
    first = patchify(frames[0], settings.max_soft_tokens, shown)
    patches = np.empty((len(frames), *first.values.shape), np.uint8)
    patches[0] = first.values
    for index, frame in enumerate(frames[1:], start=1):
        patches[index] = patchify(frame, settings.max_soft_tokens, shown).values
    zero_s = start_s if settings.stamps == "segment" else 0.0
    return PreparedVideo(
        patches=patches,
        columns=first.columns,
        rows=first.rows,
        stamps_s=[time_s - zero_s for time_s in times_s],
        media_hash=media_hash(patches.data.cast("B"), first.columns, first.rows),
    )


def unpack_video(media: memoryview | bytes, columns: int, rows: int) -> Pixels:
    """The patches of a window: a view, uint8 [frames, columns * rows, 6912].

    Raises ValueError where the bytes are no whole number of frames.
    """
    values = np.frombuffer(media, dtype=np.uint8)
    return values.reshape(-1, columns * rows, PATCH_VALUES)


def as_images(max_soft_tokens: int) -> bool:
    """Whether frames of this budget are images of their own to the engine, not one video."""
    return max_soft_tokens > ITEM_SOFT_TOKENS
