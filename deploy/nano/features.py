"""Media to what the trainer eats: patch features and audio frames, in the processor's layout."""

from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy.nano.start import FRAME_SAMPLES, patch_projection
from operators.engine import emulated_bfloat16

# The factors of the projection are rounded to bf16; these hold what they are multiplied in.
_KIND: Final = torch.float32 if emulated_bfloat16() else torch.bfloat16


@lru_cache(maxsize=1)
def _projection() -> tuple[Tensor, Tensor]:
    weight, bias = (each.bfloat16().to(_KIND) for each in patch_projection())
    return weight, bias


def patch_features(values: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Apply the frozen layer norm and projection, in bf16: uint8 [n, 6912] to float16 [n, 160]."""
    weight, bias = _projection()
    scaled = (torch.from_numpy(values).float() / 255.0).bfloat16().float()
    normed = torch.nn.functional.layer_norm(scaled, (values.shape[1],))
    factors = normed.bfloat16().to(_KIND)
    projected = torch.nn.functional.linear(factors, weight, bias).bfloat16()
    halves: NDArray[np.float16] = projected.half().numpy()
    return halves


def audio_frames(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut samples into frames [ceil(n / 640), 640], the tail padded with zeros."""
    count = -(-len(samples) // FRAME_SAMPLES)
    padded = np.zeros(count * FRAME_SAMPLES, dtype=np.float32)
    padded[: len(samples)] = samples
    return padded.reshape(count, FRAME_SAMPLES)
