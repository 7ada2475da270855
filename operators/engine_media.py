"""A request's media as the engine's model wants them: bf16 values, positions, and their places.

Plain tensors; engine.py puts them into vLLM's own classes. The names are those of the fields of
vllm/model_executor/models/gemma4_mm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from operators.patchify import positions
from operators.prepare_video import ITEM_SOFT_TOKENS
from operators.requests import AudioRequest, ImageRequest, VideoRequest

# The field of a video item that says how many frames it has.
VIDEO_FRAME_COUNTS = "video_frame_counts"


class EngineMedia(NamedTuple):
    """One or more items of a modality.

    The first axis of each tensor counts items. Where `frame_counts` names one of them, that one says
    how many frames an item has, and the first axis of the others runs over all items' frames.
    `places` has (offset, length, which of these hold embeddings; None: all) of each item.
    """

    modality: str
    tensors: dict[str, Any]
    hashes: list[str]
    places: list[tuple[int, int, Any]]
    frame_counts: str | None = None


def engine_media(request: ImageRequest | AudioRequest | VideoRequest) -> EngineMedia:
    """Raises ValueError where a video's prompt has not one placeholder for each patch."""
    if isinstance(request, ImageRequest):
        return _image(request)
    if isinstance(request, AudioRequest):
        return _audio(request)
    return _images(request) if request.as_images else _video(request)


def pixel_values(patches: np.ndarray) -> Any:  # noqa: ANN401
    """bf16 tensor of patches / 255, from uint8 of the same shape.

    In float32 first, as transformers rescales, then rounded to bf16, as vLLM casts.
    """
    import torch

    return torch.from_numpy(patches.astype(np.float32)).mul_(1 / 255).to(torch.bfloat16)


def _image(request: ImageRequest) -> EngineMedia:
    import torch

    grid = torch.from_numpy(positions(request.columns, request.rows))
    values = pixel_values(request.patches)
    return EngineMedia(
        "image",
        {"pixel_values": values[None], "pixel_position_ids": grid[None]},
        [request.media_hash],
        [(*request.placeholder, None)],
    )


def _audio(request: AudioRequest) -> EngineMedia:
    import torch

    # a copy: the object store's memory is read-only, and torch warns of that
    frames = torch.from_numpy(request.frames.copy())
    valid = torch.ones(len(frames), dtype=torch.bool)
    return EngineMedia(
        "audio",
        {"input_features_padded": frames[None], "input_features_mask": valid[None]},
        [request.media_hash],
        [(*request.placeholder, None)],
    )


def _images(request: VideoRequest) -> EngineMedia:
    """Each frame as an image, between the times that the prompt holds."""
    frames, size, _ = request.patches.shape
    values, grids = _frames(request)
    return EngineMedia(
        "image",
        {"pixel_values": values, "pixel_position_ids": grids},
        [f"{request.media_hash}-{frame}" for frame in range(frames)],
        [(int(place), size, None) for place in _places(request)[::size]],
    )


def _video(request: VideoRequest) -> EngineMedia:
    """All frames as one video, which reaches from the first patch's token to the last one's.

    What lies between frames, marks and times, is text.
    """
    import torch

    places = _places(request)
    first, length = int(places[0]), int(places[-1] - places[0] + 1)
    holds = torch.zeros(length, dtype=torch.bool)
    holds[torch.from_numpy(places - first)] = True
    return EngineMedia(
        "video",
        video_tensors(*_frames(request)),
        [request.media_hash],
        [(first, length, holds)],
        frame_counts=VIDEO_FRAME_COUNTS,
    )


def video_tensors(values: Any, grids: Any) -> dict[str, Any]:  # noqa: ANN401
    """The fields of a video item, from `_frames`, each frame padded to what the item is made for.

    As transformers' processor pads: zeros at position -1, which the model takes out again. vLLM
    encodes the videos of a step together and would fill shorter frames up with zeros at position 0,
    which stay: the patches of every frame but the first then end up in wrong places. Raises
    ValueError for frames of more patches.
    """
    import torch

    missing = ITEM_SOFT_TOKENS - values.shape[1]
    if missing < 0:
        raise ValueError(f"frames of {values.shape[1]} patches, at most {ITEM_SOFT_TOKENS} allowed")
    short = (0, 0, 0, missing)
    return {
        "pixel_values_videos": torch.nn.functional.pad(values, short),
        "pixel_position_ids_videos": torch.nn.functional.pad(grids, short, value=-1),
        VIDEO_FRAME_COUNTS: torch.tensor([len(values)]),
    }


def _frames(request: VideoRequest) -> tuple[Any, Any]:
    """bf16 [frames, n, 6912] and int64 [frames, n, 2]."""
    import torch

    grid = torch.from_numpy(positions(request.columns, request.rows))
    return pixel_values(request.patches), grid.expand(len(request.patches), -1, -1).contiguous()


def _places(request: VideoRequest) -> npt.NDArray[np.int64]:
    """Where in the prompt the patches go, [frames * patches], ascending."""
    places = np.flatnonzero(np.array(request.token_ids) == request.media_id)
    frames, size, _ = request.patches.shape
    if len(places) != frames * size:
        # the engine's process would die of it
        raise ValueError(f"{len(places)} placeholders for {frames} frames of {size} patches")
    return places
