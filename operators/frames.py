"""Waveform to frames: 640 samples, 40 ms at 16 kHz, are one audio token of the model.

Equal to transformers' Gemma4UnifiedAudioFeatureExtractor for every length. The stock engine counts
placeholders with the mel formula of other models and loses the last frame where samples % 640 is 1
to 160; here placeholders are the frames that there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 640

Waveform = npt.NDArray[np.float32]


def frames(samples: Waveform) -> Waveform:
    """float32 [n] -> float32 [ceil(n / 640), 640], the tail padded with zeros. Copies."""
    framed = np.zeros((frame_count(len(samples)), FRAME_SAMPLES), np.float32)
    framed.reshape(-1)[: len(samples)] = samples
    return framed


def frame_count(samples: int) -> int:
    """Audio tokens of so many samples."""
    return -(-samples // FRAME_SAMPLES)
