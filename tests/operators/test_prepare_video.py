"""Frames to patches as transformers' video processor makes them, for every size and budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media import photo
from transformers import Gemma4UnifiedVideoProcessor

from operators.engine_media import pixel_values
from operators.errors import MediaError
from operators.patchify import PATCH_VALUES, positions
from operators.prepare_video import as_images, prepare_video, unpack_video
from operators.settings import VideoSettings

BUDGETS = (70, 140, 280)
PROCESSORS = {budget: Gemma4UnifiedVideoProcessor(max_soft_tokens=budget) for budget in BUDGETS}


def noise(frames: int, height: int, width: int, seed: int) -> list[np.ndarray]:
    shape = (frames, height, width, 3)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def assert_equal(frames: list[np.ndarray], budget: int) -> None:
    asked = VideoSettings(max_soft_tokens=budget)
    times_s = [float(index) for index in range(len(frames))]
    try:
        theirs = PROCESSORS[budget](
            [torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)],
            do_sample_frames=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
    except ValueError:
        with pytest.raises(MediaError, match="patches") as failure:
            prepare_video(frames, times_s, 0.0, asked)
        assert failure.value.code == "prepare.aspect_ratio"
        return
    ours = prepare_video(frames, times_s, 0.0, asked)
    count = int(theirs["num_soft_tokens_per_video"][0])
    assert ours.patches.shape == (len(frames), count, PATCH_VALUES)
    assert ours.columns * ours.rows == count <= budget
    # This processor divides where that for images multiplies, which differs in float32's last bit.
    values = theirs["pixel_values_videos"][:, :count]
    assert torch.equal(torch.from_numpy(ours.patches).to(torch.float32) / 255, values)
    # The model sees the same.
    assert torch.equal(pixel_values(ours.patches), values.to(torch.bfloat16))
    places = torch.from_numpy(positions(ours.columns, ours.rows))
    assert (theirs["video_position_ids"][:, :count] == places).all()
    assert (theirs["video_position_ids"][:, count:] == -1).all()


@given(
    st.integers(1, 5),
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from(BUDGETS),
    st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_any_small_size(frames: int, height: int, width: int, budget: int, seed: int) -> None:
    assert_equal(noise(frames, height, width, seed), budget)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("height", "width"), [(1080, 1920), (720, 1280), (1280, 720), (480, 640), (577, 1023), (48, 48)]
)
def test_sizes_of_videos(height: int, width: int, budget: int) -> None:
    picture = photo(width, height)
    assert_equal([picture, picture[::-1].copy(), 255 - picture], budget)


def test_many_frames_at_once() -> None:
    assert_equal(noise(32, 180, 320, 1), 70)


def test_stamps_are_the_sources_or_the_segments() -> None:
    frames, times_s = noise(3, 50, 60, 2), [61.0, 62.5, 64.0]
    source = prepare_video(frames, times_s, 60.5, VideoSettings())
    segment = prepare_video(frames, times_s, 60.5, VideoSettings(stamps="segment"))
    assert source.stamps_s == [61.0, 62.5, 64.0]
    assert segment.stamps_s == [0.5, 2.0, 3.5]
    assert source.media_hash == segment.media_hash


def test_a_window_is_one_buffer_and_comes_back_as_frames() -> None:
    made = prepare_video(noise(4, 120, 200, 3), [0.0, 1.0, 2.0, 3.0], 0.0, VideoSettings())
    assert made.media.nbytes == made.patches.size
    back = unpack_video(bytes(made.media), made.columns, made.rows)
    np.testing.assert_array_equal(back, made.patches)
    with pytest.raises(ValueError, match="reshape"):
        unpack_video(bytes(made.media)[:-1], made.columns, made.rows)


def test_the_hash_is_of_frames_and_their_order() -> None:
    frames, times_s = noise(3, 60, 60, 4), [0.0, 1.0, 2.0]
    hashes = {
        prepare_video(shown, times_s, 0.0, VideoSettings()).media_hash
        for shown in (frames, frames[::-1], [frames[0]] * 3)
    }
    assert len(hashes) == 3


def test_grid_is_the_whole_pictures_after_a_scaled_decode() -> None:
    whole = prepare_video(noise(1, 1080, 1920, 5), [0.0], 0.0, VideoSettings())
    scaled = prepare_video(noise(1, 288, 528, 5), [0.0], 0.0, VideoSettings(), shown=(1080, 1920))
    assert (scaled.columns, scaled.rows) == (whole.columns, whole.rows) == (11, 6)


def test_frames_that_are_no_segment() -> None:
    two = [noise(1, 50, 60, 6)[0], noise(1, 60, 50, 6)[0]]
    with pytest.raises(MediaError, match="size") as failure:
        prepare_video(two, [0.0, 1.0], 0.0, VideoSettings())
    assert failure.value.code == "decode.corrupt"
    with pytest.raises(ValueError, match="2 frames and 1 times"):
        prepare_video(two, [0.0], 0.0, VideoSettings())
    with pytest.raises(ValueError, match="0 frames"):
        prepare_video([], [], 0.0, VideoSettings())


def test_only_the_smallest_budget_is_a_video_to_the_engine() -> None:
    assert [as_images(budget) for budget in BUDGETS] == [False, True, True]


@pytest.mark.engine
def test_the_engines_video_item_is_made_for_that_budget() -> None:
    from vllm.model_executor.models import gemma4_mm

    from operators.prepare_video import ITEM_SOFT_TOKENS

    assert gemma4_mm._VIDEO_MAX_SOFT_TOKENS == ITEM_SOFT_TOKENS
    assert VideoSettings.model_fields["max_frames"].default == gemma4_mm._VIDEO_MAX_FRAMES
