"""Frames equal those of transformers for every length, and placeholders equal frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4UnifiedAudioFeatureExtractor

from operators.frames import FRAME_SAMPLES, frame_count, frames

MOST_SAMPLES = 480_000
SOUND = np.random.default_rng(0).uniform(-1, 1, MOST_SAMPLES).astype(np.float32)


def check(extractor: Gemma4UnifiedAudioFeatureExtractor, length: int) -> None:
    theirs = extractor(SOUND[:length], return_tensors="np")
    ours = frames(SOUND[:length])
    assert ours.dtype == np.float32
    assert np.array_equal(theirs["input_features"][0], ours)
    assert theirs["input_features_mask"].all()
    assert len(ours) == frame_count(length)


@given(st.integers(1, MOST_SAMPLES))
@settings(max_examples=50, deadline=None)
def test_frames_are_those_of_transformers(length: int) -> None:
    check(Gemma4UnifiedAudioFeatureExtractor(), length)


def test_at_every_remainder() -> None:
    extractor = Gemma4UnifiedAudioFeatureExtractor()
    for remainder in range(FRAME_SAMPLES):
        check(extractor, (remainder % 5) * FRAME_SAMPLES + remainder + 1)
    check(extractor, MOST_SAMPLES)


def test_every_length_is_kept_whole_and_padded_with_zeros() -> None:
    for length in range(0, MOST_SAMPLES + 1, 7):
        count = frame_count(length)
        assert 0 <= count * FRAME_SAMPLES - length < FRAME_SAMPLES
    for length in (1, 639, 640, 641, 12_345, MOST_SAMPLES):
        flat = frames(SOUND[:length]).reshape(-1)
        assert np.array_equal(flat[:length], SOUND[:length])
        assert not flat[length:].any()
    assert frames(SOUND[:0]).shape == (0, FRAME_SAMPLES)


@pytest.mark.engine
def test_the_stock_engine_loses_the_last_frame_of_a_quarter_of_all_lengths() -> None:
    from vllm.model_executor.models.gemma4_mm import Gemma4ProcessingInfo

    stock = Gemma4ProcessingInfo._compute_audio_num_tokens
    for length in range(FRAME_SAMPLES, MOST_SAMPLES + 1, 53):
        lost = frame_count(length) - stock(length, 16_000, 750)
        assert lost == (1 <= length % FRAME_SAMPLES <= 160)
