"""The prompts of a job, by what the model is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from operators.prepare_video import as_images
from operators.prompt import Preset, Prompt, load_prompt
from operators.prompt_summary import SummaryPrompt, load_summary_prompt
from operators.prompt_video import VideoPrompt, load_video_prompt
from operators.settings import ModelSettings, PromptSettings, VideoSettings
from operators.tracks import Kind


class Prompts(TypedDict, total=False):
    """Plain data: it travels to the CPU workers."""

    image: Prompt
    audio: Prompt
    video: VideoPrompt
    text: SummaryPrompt


def load_prompts(
    model: ModelSettings,
    settings: PromptSettings,
    video: VideoSettings,
    instructions: Mapping[Kind, Preset],
) -> Prompts:
    """Each instruction in the checkpoint's own form. Reads its tokenizer; raises ValueError."""
    prompts = Prompts()
    for kind, asked in instructions.items():
        if kind == "video":
            prompts["video"] = load_video_prompt(
                model,
                settings,
                asked.text,
                asked.max_tokens,
                as_images=as_images(video.max_soft_tokens),
            )
        elif kind == "text":
            prompts["text"] = load_summary_prompt(model, asked.text, asked.max_tokens)
        else:
            prompts[kind] = load_prompt(model, settings, kind, asked.text, asked.max_tokens)
    return prompts
