"""Held-out examples: scenes, clips and windows of seeds that training never draws.

Words come from a bank of other speeds and pitches, and half of the windows go through a codec
after noise was added. Training batches are seeded with a tuple, these with a single number.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from deploy.nano import generate_images, generate_speech, generate_videos, instructions, prepare
from deploy.nano.batches import draw_frame_count, maybe_compress
from deploy.nano.prepare import Prepared
from deploy.nano.speech_bank import Bank

BANK_SEED: Final = 2
TAKES_PER_VOICE: Final = 2


@dataclass(frozen=True)
class Example:
    """A request, the right answer, and which row of the table it counts for."""

    request: Prepared
    expected: str
    group: str


def pictures(seed: int, count: int) -> list[Example]:
    """Draw pictures, two of three at 70 tokens and one at 280, the instructions in turn."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        budget = 280 if index % 3 == 2 else 70
        preset = list(instructions.IMAGE)[(index // 3) % 3]
        scene, pixels = generate_images.draw_picture(rng)
        asked = instructions.IMAGE[preset]
        request = prepare.of_image(maybe_compress(pixels, rng), budget, asked)
        answer = generate_images.answer(scene, asked)
        examples.append(Example(request, answer, f"image {budget} {preset}"))
    return examples


def windows(seed: int, count: int, bank: Bank) -> list[Example]:
    """Draw spoken windows of 1 to 12 words, every second one through a codec."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        preset = list(instructions.AUDIO)[index % 3]
        asked = instructions.AUDIO[preset]
        recording = generate_speech.draw_window(bank, rng)
        kind = "clean"
        if index // 3 % 2:
            codec, kbit_s = generate_speech.draw_codec(rng)
            sound = generate_speech.through_codec(recording.samples, codec, kbit_s)
            recording, kind = replace(recording, samples=sound), "coded"
        request = prepare.of_audio(recording.samples, asked)
        answer = generate_speech.answer(recording.words, asked)
        kind = kind if recording.words else "no speech"
        examples.append(Example(request, answer, f"speech {kind} {preset}"))
    return examples


def clips(seed: int, count: int) -> list[Example]:
    """Draw clips of 2 to 32 frames, the two instructions in turn."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        preset = list(instructions.VIDEO)[index % 4 == 3]
        asked = instructions.VIDEO[preset]
        frames = draw_frame_count(rng)
        clip, stamps, start, shown = generate_videos.draw_sampled_clip(rng, frames)
        if index % 2:
            shown = [maybe_compress(picture, rng, 1.0) for picture in shown]
        request = prepare.of_video(shown, stamps, asked)
        answer = generate_videos.answer(clip, asked, stamps, start)
        group = "13-32" if frames > 12 else "7-12" if frames > 6 else "2-6"
        examples.append(Example(request, answer, f"video {group} frames {preset}"))
    return examples
