"""Our patches are those of transformers' processor, bit for bit, for every size and budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media import photo
from PIL import Image
from transformers import Gemma4UnifiedImageProcessor
from transformers.models.gemma4_unified.image_processing_gemma4_unified import (
    get_aspect_ratio_preserving_size,
)

from operators.errors import MediaError
from operators.patchify import PATCH_VALUES, patchify, positions, target_size, tokens
from operators.settings import SOFT_TOKEN_BUDGETS

BUDGETS = st.sampled_from(SOFT_TOKEN_BUDGETS)
PROCESSORS = {
    budget: Gemma4UnifiedImageProcessor(max_soft_tokens=budget) for budget in SOFT_TOKEN_BUDGETS
}


def theirs(pixels: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixel_values, positions) of transformers, padding removed. Raises ValueError."""
    out = PROCESSORS[budget](Image.fromarray(pixels), return_tensors="pt")
    count = int(out["num_soft_tokens_per_image"][0])
    assert (out["image_position_ids"][0, count:] == -1).all()
    return out["pixel_values"][0, :count].numpy(), out["image_position_ids"][0, :count].numpy()


def assert_equal(pixels: np.ndarray, budget: int) -> None:
    try:
        values, places = theirs(pixels, budget)
    except ValueError:
        with pytest.raises(MediaError, match="patches") as failure:
            patchify(pixels, budget)
        assert failure.value.code == "prepare.aspect_ratio"
        return
    ours = patchify(pixels, budget)
    assert ours.values.dtype == np.uint8
    assert ours.values.flags.c_contiguous
    assert ours.values.shape == (ours.columns * ours.rows, PATCH_VALUES)
    # multiplied in torch's float32, as the processor does
    scaled = torch.from_numpy(ours.values).to(torch.float32) * (1 / 255)
    np.testing.assert_array_equal(scaled.numpy(), values)
    np.testing.assert_array_equal(positions(ours.columns, ours.rows), places)
    assert tokens(*pixels.shape[:2], budget) == len(ours.values)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 400), st.integers(1, 400), BUDGETS, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_any_small_size(height: int, width: int, budget: int, seed: int) -> None:
    assert_equal(noise(height, width, seed), budget)


@pytest.mark.parametrize("budget", SOFT_TOKEN_BUDGETS)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        *[(1, 1), (2, 1), (1, 47), (1, 70), (1, 71), (1, 5000), (3, 2), (48, 48), (49, 47)],
        *[(50, 10_000), (10_000, 50), (50, 3520), (700, 10), (96, 48), (672, 912), (912, 672)],
        *[(480, 640), (1080, 1920), (333, 777)],
    ],
)
def test_odd_sizes(height: int, width: int, budget: int) -> None:
    assert_equal(noise(height, width, 1), budget)


@given(st.integers(1, 10_000), st.integers(1, 10_000), BUDGETS)
@example(1, 1, 70)
@example(10_000, 50, 1120)
@example(50, 10_000, 70)
@settings(max_examples=1000, deadline=None)
def test_target_size_is_theirs_or_both_refuse(height: int, width: int, budget: int) -> None:
    try:
        expected = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
    except ValueError:
        with pytest.raises(MediaError):
            target_size(height, width, budget)
    else:
        assert target_size(height, width, budget) == expected


@pytest.mark.parametrize("budget", [70, 280, 1120])
def test_photo_made_smaller(budget: int) -> None:
    assert_equal(photo(2000, 1501), budget)


def test_known_token_counts() -> None:
    counts = {
        size: [tokens(*size, budget) for budget in SOFT_TOKEN_BUDGETS]
        for size in [(1080, 1920), (768, 1024), (1000, 1000)]
    }
    assert counts == {
        (1080, 1920): [66, 120, 264, 527, 1100],
        (768, 1024): [63, 130, 266, 540, 1064],
        (1000, 1000): [64, 121, 256, 529, 1089],
    }


def test_read_only_and_strided_pixels() -> None:
    pixels = noise(300, 500, 2)
    expected = patchify(pixels, 70).values
    frozen = pixels.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(patchify(frozen, 70).values, expected)
    wide = np.repeat(pixels, 2, axis=1)
    np.testing.assert_array_equal(patchify(wide[:, ::2], 70).values, expected)


def test_grid_is_the_whole_pictures_after_a_scaled_decode() -> None:
    # 8 px of 2999x2001 round up to 375x251, which alone would give another grid
    small = noise(251, 375, 3)
    patches = patchify(small, 280, shown=(2001, 2999))
    assert len(patches.values) == tokens(2001, 2999, 280)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0)])
def test_no_pixels(height: int, width: int) -> None:
    with pytest.raises(MediaError, match="no pixels"):
        target_size(height, width, 280)
