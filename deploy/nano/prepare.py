"""Finished model inputs for the evaluation: the same tensors for transformers and for vLLM.

Pictures go through the product's own `operators.patchify`; prompts are the ones of training, which
`evaluate.py` and the tests hold against the checkpoint's chat template.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy.nano import features, sequences
from deploy.nano.generate_images import Pixels
from deploy.nano.tokenizer import ID
from operators.engine import media_input
from operators.engine_media import VIDEO_FRAME_COUNTS, EngineMedia, video_tensors
from operators.patchify import patchify, positions

VIDEO_BUDGET: Final = 70
SOFT: Final = {"image": ID["<|image|>"], "video": ID["<|video|>"], "audio": ID["<|audio|>"]}


@dataclass(frozen=True)
class Prepared:
    """One request.

    `values` is uint8 [n, 6912] for an image, uint8 [frames, n, 6912] for a video and float32
    [t, 640] for audio; `xy` is int64 [n, 2], the same for each frame, empty for audio.
    """

    modality: str
    token_ids: tuple[int, ...]
    values: NDArray[Any]
    xy: NDArray[np.int64]

    @property
    def media_hash(self) -> str:
        """Hash of the values, as the engine wants one."""
        return hashlib.sha256(np.ascontiguousarray(self.values).tobytes()).hexdigest()

    def with_values(self, values: NDArray[Any]) -> "Prepared":
        """Return the request with other media of the same shape."""
        return replace(self, values=values)


def of_image(pixels: Pixels, budget: int, instruction: str) -> Prepared:
    """Prepare a picture, uint8 RGB [height, width, 3]."""
    cut = patchify(pixels, budget)
    ids = sequences.of_image(len(cut.values), [(instruction, "")]).ids
    return Prepared("image", tuple(ids.tolist()), cut.values, positions(cut.columns, cut.rows))


def of_video(frames: list[Pixels], stamps_s: list[float], instruction: str) -> Prepared:
    """Prepare frames of one size with their times."""
    cuts = [patchify(frame, VIDEO_BUDGET) for frame in frames]
    ids = sequences.of_video(len(cuts[0].values), stamps_s, [(instruction, "")]).ids
    values = np.stack([cut.values for cut in cuts])
    return Prepared("video", tuple(ids.tolist()), values, positions(cuts[0].columns, cuts[0].rows))


def of_audio(samples: NDArray[np.float32], instruction: str) -> Prepared:
    """Prepare mono samples at 16 kHz."""
    frames = features.audio_frames(samples)
    ids = sequences.of_audio(len(frames), instruction, "").ids
    return Prepared("audio", tuple(ids.tolist()), frames, np.zeros((0, 2), dtype=np.int64))


def pixel_values(values: NDArray[np.uint8]) -> Tensor:
    """Rescale to 0..1 in float32 and round to bf16, as the processor and the engine do."""
    return torch.from_numpy(values.astype(np.float32)).mul_(1 / 255).to(torch.bfloat16)


def for_transformers(request: Prepared) -> dict[str, Tensor]:
    """Return the keyword arguments of `generate`."""
    ids = torch.tensor([request.token_ids])
    kind = torch.zeros_like(ids)
    for number, modality in enumerate(("image", "video", "audio"), start=1):
        kind[ids == SOFT[modality]] = number
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kind}
    xy = torch.from_numpy(request.xy)
    if request.modality == "image":
        inputs |= {"pixel_values": pixel_values(request.values)[None]}
        inputs |= {"image_position_ids": xy[None]}
    elif request.modality == "video":
        count = len(request.values)
        inputs |= {"pixel_values_videos": pixel_values(request.values)}
        inputs |= {"video_position_ids": xy[None].repeat(count, 1, 1)}
        inputs |= {"num_frames_per_video": torch.tensor([count])}
    else:
        inputs |= {"input_features": torch.from_numpy(request.values)[None]}
        inputs |= {"input_features_mask": torch.ones(1, len(request.values), dtype=torch.bool)}
    return inputs


def for_engine(request: Prepared) -> Any:  # noqa: ANN401
    """Return vLLM's own input of finished tensors. Imports vllm."""
    ids = np.array(request.token_ids)
    places = np.flatnonzero(ids == SOFT[request.modality])
    first, last = int(places[0]), int(places[-1])
    is_embed: Tensor | None = None
    frame_counts: str | None = None
    xy = torch.from_numpy(request.xy)
    if request.modality == "image":
        tensors = {"pixel_values": pixel_values(request.values)[None]}
        tensors |= {"pixel_position_ids": xy[None]}
    elif request.modality == "audio":
        tensors = {"input_features_padded": torch.from_numpy(request.values)[None]}
        tensors |= {"input_features_mask": torch.ones(1, len(request.values), dtype=torch.bool)}
    else:
        frame_counts = VIDEO_FRAME_COUNTS
        grids = xy[None].repeat(len(request.values), 1, 1)
        tensors = video_tensors(pixel_values(request.values), grids)
        # Times and picture marks lie between the frames' tokens.
        is_embed = torch.from_numpy(ids[first : last + 1] == SOFT["video"])
    place = (first, last - first + 1, is_embed)
    media = EngineMedia(request.modality, tensors, [request.media_hash], [place], frame_counts)
    return media_input(list(request.token_ids), media)
