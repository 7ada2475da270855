"""What is asked of the engine: random pictures, noise like speech, and frames, in three forms.

    ceiling    the engine's own input, everything made before the clock starts
    prepared   our workers' output (uint8 patches, float32 frames); the front process makes tensors of it
    raw        decoded pixels or samples, for vLLM's own processor, as its user would hand them over

Media are random and never zeros, and each request has a hash or pixels of its own: an engine that has
seen a medium would embed it once only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench.gpu.stream import Source

from operators.engine import media_input
from operators.engine_media import engine_media
from operators.frames import SAMPLE_RATE_HZ, frames
from operators.patchify import patchify
from operators.prepare_video import prepare_video
from operators.prompt import PRESETS, VIDEO_PRESETS, Prompt, load_prompt, transcribe_instruction
from operators.prompt_video import VideoPrompt, load_video_prompt
from operators.requests import AudioRequest, ImageRequest, VideoRequest
from operators.settings import AudioSettings, ModelSettings, PromptSettings, VideoSettings

Pixels = npt.NDArray[np.uint8]
Finished = ImageRequest | AudioRequest | VideoRequest
FORMS = ("ceiling", "prepared", "raw")
VIDEO_FRAMES = 32
# of a decoded frame: what a pipeline scales to before it holds 32 of them
VIDEO_SIZE = (640, 360)


def picture(number: int, width: int = 1920, height: int = 1080) -> Pixels:
    """uint8 [height, width, 3]: large shapes with fine noise on them, a JPEG of some 0.5 MB."""
    draw = np.random.default_rng(number)
    coarse = draw.integers(30, 226, (height // 60 + 1, width // 60 + 1, 3), dtype=np.int16)
    large = coarse.repeat(60, axis=0).repeat(60, axis=1)[:height, :width]
    noise = draw.integers(-12, 13, (height // 2 + 1, width // 2 + 1, 1), dtype=np.int16)
    fine = noise.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return (large + fine).clip(0, 255).astype(np.uint8)


def marked(pixels: Pixels, number: int) -> Pixels:
    """A copy that no other number gives: 4 bytes of it in the first pixels."""
    copy = pixels.copy()
    copy.reshape(-1)[:4] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
    return copy


def speech(number: int, duration_s: float) -> npt.NDArray[np.float32]:
    """float32 [n] at 16 kHz: noise below 4 kHz that comes and goes four times a second."""
    draw = np.random.default_rng(number)
    count = int(duration_s * SAMPLE_RATE_HZ)
    white = draw.normal(0, 0.3, count + 7).astype(np.float32)
    low = np.convolve(white, np.full(8, 1 / 8, np.float32), mode="valid")
    seconds = np.arange(count, dtype=np.float32) / SAMPLE_RATE_HZ
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * seconds + draw.uniform(0, 6.28))
    return (low * syllables).astype(np.float32)


@dataclass(frozen=True)
class Task:
    """One kind of item. `in_flight` stays above what the KV cache of an H200 holds at once."""

    name: str
    modality: str
    output_tokens: int
    budget: int = 0
    duration_s: float = 0.0
    in_flight: int = 640
    # so many different media; requests go round in them
    distinct: int = 128
    distinct_raw: int = 1024


TASKS = {
    task.name: task
    for task in (
        Task("image-140", "image", 100, budget=140),
        Task("image-280", "image", 100, budget=280),
        Task("image-560", "image", 100, budget=560, in_flight=512),
        Task("audio-15", "audio", 60, duration_s=15, in_flight=640),
        Task("audio-30", "audio", 60, duration_s=30, in_flight=400),
        # 128 segments are 300,000 tokens: the matrices are as busy as with more, the warm-up shorter
        Task("video-32", "video", 150, 70, in_flight=128, distinct=32, distinct_raw=192),
    )
}


@dataclass
class Feed:
    """A task's requests for one checkpoint. Media are made when they are first needed."""

    task: Task
    checkpoint: Path

    def source(self, form: str, *, uint8: bool = False) -> Source:
        """Prompts in a form. uint8: the patches of the embedder's prototype, in the ceiling's form."""
        if form == "raw":
            made = self._raw
        elif form == "prepared":
            made = self._prepared
        elif form == "ceiling":
            made = self._ceiling(uint8)
        else:
            raise ValueError(f"a form is one of {', '.join(FORMS)}; got {form!r}")
        return made

    def patches(self) -> int:
        """Patches of one item; 0 for sound."""
        first = self._finished[0]
        if isinstance(first, AudioRequest):
            return 0
        return int(np.prod(first.patches.shape[:-1]))

    def prompt_of(self, media_tokens: int) -> tuple[list[int], tuple[int, int]]:
        """(token ids, placeholder) of a request about one image or sound of so many tokens."""
        assert isinstance(self._prompt, Prompt)
        ids = self._prompt.window(media_tokens)
        return ids, self._prompt.placeholder(ids)

    async def _prepared(self, number: int) -> Any:
        """As the engine's actor does it: tensors are made on a thread of the front process."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, engine_input, self._request(number))

    def _ceiling(self, uint8: bool) -> Source:
        inputs = [engine_input(each, uint8=uint8) for each in self._finished]

        async def made(number: int) -> Any:
            ready = inputs[number % len(inputs)]
            return {**ready, "mm_hashes": {self.task.modality: [f"{self.task.name}-{number}"]}}

        return made

    async def _raw(self, number: int) -> Any:
        return {
            "prompt": self._raw_prompt,
            "multi_modal_data": {self.task.modality: self._media[number % len(self._media)]},
            "mm_processor_kwargs": (
                {"max_soft_tokens": self.task.budget} if self.task.modality == "image" else {}
            ),
        }

    def _request(self, number: int) -> Finished:
        finished = self._finished[number % len(self._finished)]
        return replace(finished, media_hash=f"{self.task.name}-{number}")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(8, thread_name_prefix="feed")

    @cached_property
    def _prompt(self) -> Prompt | VideoPrompt:
        model = ModelSettings(id=str(self.checkpoint))
        if self.task.modality == "video":
            text = VIDEO_PRESETS["video-describe"].text
            return load_video_prompt(model, PromptSettings(), text, 256, as_images=False)
        text = PRESETS["caption-dense"].text
        if self.task.modality == "audio":
            text = transcribe_instruction(AudioSettings(language="English")).text
        return load_prompt(model, PromptSettings(), self.task.modality, text, 256)

    @property
    def _raw_prompt(self) -> str:
        from operators.prompt import STAND_IN

        if isinstance(self._prompt, VideoPrompt):
            text = f"{self._prompt.before}<|video|>{self._prompt.after}"
            return text.replace(STAND_IN, self._prompt.text)
        return self._prompt.raw()

    @cached_property
    def _finished(self) -> list[Finished]:
        make: Callable[[int], Finished] = getattr(self, f"_finished_{self.task.modality}")
        return list(self._pool.map(make, range(self.task.distinct)))

    def _finished_image(self, number: int) -> ImageRequest:
        cut = patchify(picture(number), self.task.budget)
        ids, place = self.prompt_of(len(cut.values))
        return ImageRequest(ids, place, cut.values, cut.columns, cut.rows, str(number))

    def _finished_audio(self, number: int) -> AudioRequest:
        framed = frames(speech(number, self.task.duration_s))
        return AudioRequest(*self.prompt_of(len(framed)), framed, str(number))

    def _finished_video(self, number: int) -> VideoRequest:
        shown = [picture(number * VIDEO_FRAMES + at, *VIDEO_SIZE) for at in range(VIDEO_FRAMES)]
        times_s = [float(at) for at in range(VIDEO_FRAMES)]
        made = prepare_video(shown, times_s, 0.0, VideoSettings())
        assert isinstance(self._prompt, VideoPrompt)
        ids = self._prompt.window(made.columns * made.rows, made.stamps_s)
        media_id = self._prompt.media_id
        return VideoRequest(
            ids, media_id, made.patches, made.columns, made.rows, False, str(number)
        )

    @cached_property
    def _media(self) -> list[Any]:
        """Raw media, each of its own: as many as can be in the engine at once, and more."""
        from PIL import Image

        base = max(1, self.task.distinct // 4)
        if self.task.modality == "audio":
            sounds = list(self._pool.map(lambda n: speech(n, self.task.duration_s), range(base)))
            return [
                (sounds[number % base] * np.float32(1 - 1e-5 * number), SAMPLE_RATE_HZ)
                for number in range(self.task.distinct_raw)
            ]
        if self.task.modality == "image":
            shown = list(self._pool.map(picture, range(base)))
            return [
                Image.fromarray(marked(shown[number % base], number))
                for number in range(self.task.distinct_raw)
            ]
        clips = [
            np.stack([picture(clip * VIDEO_FRAMES + at, *VIDEO_SIZE) for at in range(VIDEO_FRAMES)])
            for clip in range(max(1, base // 4))
        ]
        metadata = {
            "fps": 1.0,
            "duration": float(VIDEO_FRAMES),
            "total_num_frames": VIDEO_FRAMES,
            "frames_indices": list(range(VIDEO_FRAMES)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        return [
            (marked(clips[number % len(clips)], number), metadata)
            for number in range(self.task.distinct_raw)
        ]


def engine_input(request: Finished, *, uint8: bool = False) -> Any:
    """vLLM's own input of a prepared request. uint8: patches as they are, for the embedder's prototype."""
    media = engine_media(request)
    if uint8:
        import torch

        assert isinstance(request, ImageRequest)
        patches = torch.from_numpy(request.patches)[None]
        media = media._replace(tensors=media.tensors | {"pixel_values": patches})
    return media_input(request.token_ids, media)
