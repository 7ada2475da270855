"""Frames through vLLM's CPU engine: what its own path would get, and answers that are right."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma4UnifiedForConditionalGeneration, PreTrainedTokenizerFast

from deploy.nano import generate_videos, instructions
from operators.engine import Engine, EngineOptions, _engine_input, media_limits
from operators.engine_media import pixel_values
from operators.frames import frames as sound_frames
from operators.patchify import positions
from operators.prepare_image import media_hash
from operators.prepare_video import as_images, prepare_video
from operators.prompt import load_prompt, transcribe_instruction
from operators.prompt_summary import SUMMARY, Line, load_summary_prompt
from operators.prompt_video import VideoPrompt, load_video_prompt
from operators.requests import Answer, AudioRequest, TextRequest, VideoRequest
from operators.settings import (
    AudioSettings,
    ModelSettings,
    PromptSettings,
    SamplingSettings,
    VideoSettings,
)

pytestmark = pytest.mark.engine

ANSWER_TOKENS = 24
MODEL_TOKENS = 8192
# A little under what the checkpoint reaches on these clips; with frames out of order, or a patch grid
# turned, it does not reach half of it.
FLOOR = 0.9


def options(max_soft_tokens: int) -> EngineOptions:
    return EngineOptions(
        modality="video",
        max_soft_tokens=max_soft_tokens,
        answer_tokens=ANSWER_TOKENS,
        max_num_seqs=8,
        max_num_batched_tokens=4096,
        gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        stall_timeout_s=300,
        load_format="auto",
    )


def model_settings(nano: Path) -> ModelSettings:
    return ModelSettings(id=str(nano), max_model_len=MODEL_TOKENS)


@pytest.fixture(scope="module", params=[70, 140])
def budget(request: pytest.FixtureRequest) -> int:
    """Frames of one video, and frames that travel as images."""
    return int(request.param)


@pytest.fixture(scope="module")
def engine(nano: Path, budget: int) -> Iterator[Engine]:
    started = Engine(model_settings(nano), SamplingSettings(), options(budget))
    yield started
    started.close()
    gc.collect()


@pytest.fixture(scope="module")
def prompts(nano: Path) -> dict[tuple[str, int], VideoPrompt]:
    return {
        (text, budget): load_video_prompt(
            model_settings(nano),
            PromptSettings(),
            text,
            ANSWER_TOKENS,
            as_images=as_images(budget),
        )
        for text in instructions.VIDEO.values()
        for budget in (70, 140)
    }


class Clip:
    """Frames, their times, an instruction and the right answer."""

    def __init__(self, seed: int, count: int, text: str) -> None:
        rng = np.random.default_rng(seed)
        drawn = generate_videos.draw_sampled_clip(rng, count)
        clip, self.times_s, self.start_s, self.frames = drawn
        self.text = text
        self.expected = generate_videos.answer(clip, text, self.times_s, self.start_s)

    def request(self, prompts: dict[tuple[str, int], VideoPrompt], budget: int) -> VideoRequest:
        prompt = prompts[self.text, budget]
        asked = VideoSettings(max_soft_tokens=budget)
        made = prepare_video(self.frames, self.times_s, self.start_s, asked)
        return VideoRequest(
            token_ids=prompt.window(made.patches.shape[1], made.stamps_s),
            media_id=prompt.media_id,
            patches=made.patches,
            columns=made.columns,
            rows=made.rows,
            as_images=prompt.as_images,
            media_hash=made.media_hash,
        )


def clips(count: int) -> list[Clip]:
    texts = list(instructions.VIDEO.values())
    lengths = [2, 5, 9, 14, 32, 7]
    return [
        Clip(3_000_003 + index, lengths[index % len(lengths)], texts[index % 4 == 3])
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def processor(nano: Path) -> Any:
    """vLLM's own, for raw frames."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=str(nano)))


@pytest.mark.parametrize("times_s", [[0], [0, 1, 2, 3], [58, 59, 60], [3600, 6001]])
def test_our_video_is_what_vllms_own_path_makes_of_the_frames(
    processor: Any,
    prompts: dict[tuple[str, int], VideoPrompt],
    nano: Path,
    times_s: list[float],
) -> None:
    clip = Clip(1, 4, instructions.VIDEO_DESCRIBE)
    clip.frames, clip.times_s = clip.frames[: len(times_s)], times_s
    request = clip.request(prompts, 70)
    ours = _engine_input(request)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(nano)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": clip.text}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    metadata = {
        "fps": 1.0,
        "duration": 7000.0,
        "total_num_frames": 7000,
        "frames_indices": times_s,
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    items = processor.info.parse_mm_data({"video": [(np.stack(clip.frames), metadata)]})
    theirs = processor(rendered, items)
    assert theirs["prompt_token_ids"] == ours["prompt_token_ids"]
    (place,), (own_place,) = theirs["mm_placeholders"]["video"], ours["mm_placeholders"]["video"]
    # theirs begins with the first time, ours with the first patch: the same tokens hold patches
    assert place.extract_embeds_range() == own_place.extract_embeds_range()
    assert place.get_num_embeds() == own_place.get_num_embeds() == request.patches[..., 0].size
    (item,), (own,) = theirs["mm_kwargs"]["video"], ours["mm_kwargs"]["video"]
    values = item["pixel_values_videos"].data
    assert torch.equal(values.to(torch.bfloat16), own["pixel_values_videos"].data)
    grids = item["pixel_position_ids_videos"].data
    assert torch.equal(grids, own["pixel_position_ids_videos"].data)
    assert (grids[:, request.patches.shape[1] :] == -1).all()
    assert int(own["video_frame_counts"].data) == int(item["video_frame_counts"].data)


@pytest.mark.parametrize("budget", [70], indirect=True)  # all that the checkpoint has seen
def test_answers_are_right(
    engine: Engine, prompts: dict[tuple[str, int], VideoPrompt], budget: int
) -> None:
    asked = clips(40)
    futures = [engine.submit(clip.request(prompts, budget)) for clip in asked]
    pairs = [
        (clip.expected, future.result(300).text)
        for clip, future in zip(asked, futures, strict=True)
    ]
    wrong = [(expected, said) for expected, said in pairs if expected != said]
    assert 1 - len(wrong) / len(pairs) >= FLOOR, wrong


def test_answers_are_those_of_transformers(
    engine: Engine, prompts: dict[tuple[str, int], VideoPrompt], budget: int, nano: Path
) -> None:
    model = Gemma4UnifiedForConditionalGeneration.from_pretrained(nano, dtype=torch.bfloat16)
    # vLLM's CPU backend has no bidirectional attention between a frame's tokens: neither has this.
    model.config.get_text_config().use_bidirectional_attention = None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(nano)
    for clip in clips(4):
        request = clip.request(prompts, budget)
        ids = torch.tensor([request.token_ids])
        # whatever the frames are to the engine, they are one video to this model
        video_id = prompts[clip.text, 70].media_id
        ids[ids == request.media_id] = video_id
        grid = torch.from_numpy(positions(request.columns, request.rows))
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=2 * (ids == video_id).long(),
            pixel_values_videos=pixel_values(request.patches),
            video_position_ids=grid.expand(len(request.patches), -1, -1),
            num_frames_per_video=torch.tensor([len(request.patches)]),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        answer = engine.submit(request).result(300)
        assert answer.text.strip() == expected.strip()
        assert answer.media_tokens == request.patches[..., 0].size
        assert answer.prompt_tokens == len(request.token_ids)


def test_an_answer_does_not_depend_on_what_else_is_asked(
    engine: Engine, prompts: dict[tuple[str, int], VideoPrompt], budget: int
) -> None:
    """Frames of several shapes, 63 to 70 or 130 to 140 patches, are encoded in one step of the engine."""
    requests = [clip.request(prompts, budget) for clip in clips(16)]
    assert len({request.patches.shape[1] for request in requests}) > 2
    alone = [engine.submit(request).result(300).text for request in requests]
    # vLLM keeps what it has encoded by its hash
    fresh = [replace(each, media_hash=f"{each.media_hash}-again") for each in requests]
    futures = [engine.submit(request) for request in fresh]
    together = [future.result(300).text for future in futures]
    # one more product in a batch may round another way
    assert sum(a != b for a, b in zip(alone, together, strict=True)) <= 1, (alone, together)


def test_an_answer_may_have_a_limit_of_its_own(
    engine: Engine, prompts: dict[tuple[str, int], VideoPrompt], budget: int
) -> None:
    request = clips(1)[0].request(prompts, budget)
    cut = engine.submit(replace(request, max_tokens=2)).result(120)
    assert (cut.finish_reason, cut.output_tokens) == ("length", 2)
    assert engine.submit(request).result(120).output_tokens > 2


def test_frames_that_do_not_fit_their_prompt_never_reach_the_engine(
    engine: Engine, prompts: dict[tuple[str, int], VideoPrompt], budget: int
) -> None:
    request = clips(1)[0].request(prompts, budget)
    with pytest.raises(ValueError, match="placeholders for 1 frames"):
        engine.submit(replace(request, patches=request.patches[:1]))
    assert isinstance(engine.submit(request).result(120), Answer)


def test_the_engine_of_a_video_takes_its_sound_and_its_summary(engine: Engine, nano: Path) -> None:
    asked = transcribe_instruction(AudioSettings())
    prompt = load_prompt(model_settings(nano), PromptSettings(), "audio", asked.text, ANSWER_TOKENS)
    heard = sound_frames(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32))
    ids = prompt.window(len(heard))
    sound = AudioRequest(ids, prompt.placeholder(ids), heard, media_hash(heard.tobytes(), 25, 1))
    assert engine.submit(sound).result(120).media_tokens == 25

    lines = [Line(10.0 * index, "a red circle moves left") for index in range(6)]
    written = load_summary_prompt(model_settings(nano), SUMMARY.text, ANSWER_TOKENS).window(lines)
    answer = engine.submit(TextRequest(written, max_tokens=5)).result(120)
    assert answer.prompt_tokens == len(written)
    assert answer.media_tokens == 0
    assert 0 < answer.output_tokens <= 5


def test_what_an_engine_is_started_for() -> None:
    assert media_limits(options(70)) == {"image": 0, "video": 1, "audio": 1}
    assert media_limits(options(280)) == {"image": 32, "video": 0, "audio": 1}
    pictures = replace(options(280), modality="image")
    assert media_limits(pictures) == {"image": 1, "video": 0, "audio": 0}
    assert media_limits(replace(pictures, modality="audio")) == {"image": 0, "video": 0, "audio": 1}
