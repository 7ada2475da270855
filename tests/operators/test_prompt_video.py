"""Frames in the prompt: the tokens of transformers' processor for the same frames and times."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from operators.errors import MediaError
from operators.prompt import VIDEO_PRESETS, TokenizerFile, instruction
from operators.prompt_video import (
    MINUTES,
    Clock,
    VideoPrompt,
    encoder,
    load_video_prompt,
    make_clock,
    most_tokens,
    stamp,
)
from operators.settings import ModelSettings, PromptSettings

TEXT = VIDEO_PRESETS["video-describe"].text
FRAME = np.zeros((48, 48, 3), np.uint8)


def load(nano: Path, text: str = TEXT, *, as_images: bool = False) -> VideoPrompt:
    return load_video_prompt(
        ModelSettings(id=str(nano)), PromptSettings(), text, 64, as_images=as_images
    )


@pytest.fixture(scope="module")
def prompt(nano: Path) -> VideoPrompt:
    return load(nano)


@pytest.fixture(scope="module")
def theirs(nano: Path) -> object:
    processor = AutoProcessor.from_pretrained(nano)
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEXT}]}],
        add_generation_prompt=True,
    )

    def ask(times_s: list[int]) -> list[int]:
        metadata = VideoMetadata(
            total_num_frames=len(times_s), fps=1, frames_indices=times_s, duration=times_s[-1]
        )
        return processor(
            text=rendered,
            videos=[np.stack([FRAME] * len(times_s))],
            video_metadata=[metadata],
            do_sample_frames=False,
            add_special_tokens=False,
            return_tensors="pt",
        )["input_ids"][0].tolist()

    return ask


@pytest.mark.parametrize(
    "times_s", [[0], [0, 1, 2], [59, 60, 61], [3599, 3600, 5999, 6000, 6001], [86_399, 359_999]]
)
def test_tokens_are_those_of_the_checkpoints_processor(
    prompt: VideoPrompt, theirs: object, times_s: list[int]
) -> None:
    # a frame of 48x48 becomes 8x8 patches
    assert prompt.window(64, times_s) == theirs(times_s)


@given(st.lists(st.integers(0, 359_999), min_size=1, max_size=32).map(sorted))
@settings(max_examples=20, deadline=None)
def test_tokens_at_any_times(prompt: VideoPrompt, theirs: object, times_s: list[int]) -> None:
    assert prompt.window(64, times_s) == theirs(times_s)


def test_frames_as_images_are_the_same_text_with_the_images_token(
    prompt: VideoPrompt, nano: Path
) -> None:
    images = load(nano, as_images=True)
    assert images.media_id != prompt.media_id
    swapped = [images.media_id if id == prompt.media_id else id for id in prompt.window(5, [0, 61])]
    assert images.window(5, [0, 61]) == swapped


@pytest.mark.parametrize("as_images", [False, True])
def test_variables_are_filled_in_after_a_pickle_to_a_worker(nano: Path, as_images: bool) -> None:
    asked = TEXT.replace("video", "{what}")
    filled: VideoPrompt = pickle.loads(pickle.dumps(load(nano, asked, as_images=as_images)))
    plain = load(nano, as_images=as_images)
    assert isinstance(plain.times, Clock)
    assert isinstance(filled.times, TokenizerFile)
    times_s = [0.0, 59.99, 6001.5]
    assert filled.window(7, times_s, {"what": "video"}) == plain.window(7, times_s)
    for value in ("<|video|>", "<turn|>"):
        with pytest.raises(MediaError, match="holds the token"):
            filled.window(7, times_s, {"what": value})


def test_seconds_are_cut_down_and_minutes_go_on() -> None:
    times_s = [-0.5, 0.0, 0.999, 59.999, 60.0, 3600.0, 4503.2, 6000.0]
    shown = ["00:00", "00:00", "00:00", "00:59", "01:00", "60:00", "75:03", "100:00"]
    assert [stamp(time_s) for time_s in times_s] == shown


def test_a_time_that_no_clock_shows_costs_its_row(prompt: VideoPrompt) -> None:
    with pytest.raises(MediaError, match=r"video\.stamps: segment") as failure:
        prompt.window(5, [MINUTES * 60.0])
    assert failure.value.code == "prepare.too_long"


def test_a_prompt_that_leaves_no_room_is_refused(prompt: VideoPrompt) -> None:
    with pytest.raises(MediaError, match=r"model\.max_model_len") as failure:
        prompt.window(280, [float(second) for second in range(32)])
    assert failure.value.code == "prepare.too_long"
    assert len(prompt.window(70, [100_000.0 + s for s in range(32)])) < most_tokens(32, 70) + 60


def joining_tokenizer(*joined: str) -> Tokenizer:
    """Single characters, and tokens of several that are liked better."""
    pieces = [(character, -10.0) for character in "0123456789:▁a\n"]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((piece, -1.0) for piece in joined)], 0))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


@pytest.mark.parametrize(
    ("joined", "known"),
    [
        ((), True),
        (("00", "▁1", "59▁"), True),
        # a time is more than its parts
        (("2:3",), False),
        (("4:", ":5"), False),
        # what stands before the first one takes part of it
        (("a0",), False),
    ],
)
def test_a_clock_only_where_times_are_their_parts(joined: tuple[str, ...], known: bool) -> None:
    encode = encoder(joining_tokenizer(*joined))
    clock = make_clock(encode, "a")
    assert (clock is not None) == known
    if clock is not None:
        (whole,) = encode(["a75:03 "])
        (head,) = encode(["a"])
        assert head + clock.ids(75 * 60 + 3.9, first=True) == whole


def test_presets_for_video() -> None:
    settings = PromptSettings(preset="video-objects")
    assert instruction(settings, "", VIDEO_PRESETS).text == VIDEO_PRESETS["video-objects"].text
    with pytest.raises(
        ValueError, match=r"prompt\.preset: must be one of .*video-describe.*'tags'"
    ):
        instruction(PromptSettings(preset="tags"), "video-describe", VIDEO_PRESETS)
    with pytest.raises(ValueError, match=r"prompt\.preset"):
        instruction(settings, "caption-dense")


def test_the_nano_checkpoint_is_asked_what_it_was_trained_on() -> None:
    instructions = pytest.importorskip("deploy.nano.instructions")
    assert {preset.text for preset in VIDEO_PRESETS.values()} >= set(instructions.VIDEO.values())
