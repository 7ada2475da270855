"""Training batches: a pure function of (seed, step), so an interrupted run goes on where it was.

A step is four micro-batches: pictures of 70 tokens, pictures of 280, clips of frames, spoken windows.
Each is a dict of arrays: the fields of `sequences.stack`, plus `features` float16 [n, 160] and `xy`
int64 [n, 2] for vision or `frames` float32 [n, 640] for audio, in the order of the placeholders,
plus the labels of the auxiliary losses (class per patch or frame, -1 where there is none).
"""

import io
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from deploy.nano import (
    features,
    generate_images,
    generate_speech,
    generate_videos,
    instructions,
    sequences,
)
from deploy.nano.espeak import SAMPLE_RATE_HZ
from deploy.nano.generate_images import Pixels, Thing
from deploy.nano.generate_speech import MAX_WORDS, Recording
from deploy.nano.speech_bank import Bank
from deploy.nano.start import FRAME_SAMPLES
from deploy.nano.words import COLOURS, SHAPES, SPOKEN
from operators.patchify import patchify, positions

Batch = dict[str, NDArray[Any]]

_COLOUR_INDEX: Final = {name: index + 1 for index, name in enumerate(COLOURS)}
_SHAPE_INDEX: Final = {name: index + 1 for index, name in enumerate(SHAPES)}
_WORD_INDEX: Final = {name: index + 1 for index, name in enumerate(SPOKEN)}
PATCH_CLASSES: Final = {"colour": 7, "shape": 7, "order": 4}
EVENT_CLASSES: Final = 9
SECOND_CLASSES: Final = 60
FRAME_CLASSES: Final = {"word": len(SPOKEN) + 1, "order": 13}


# Audio starts with windows of two words and reaches all twelve at this step.
ALL_WORDS_AT: Final = 500
# From this step on the patches at a thing's rim are labelled too: hues first, then contours.
CONTOURS_AT: Final = 600
# From this step on the patches of a moving or changing thing are labelled with what happens to it,
# and every patch of a clip with its frame's second: without those 2000 steps did not teach events
# or their times.
EVENTS_AT: Final = 700
# From this step on a step holds more, and the labels count less.
FULL_AT: Final = 1000
# From this step on, while the rate goes down, more of the pictures have 280 tokens: without that
# 96 % of those with 70 were right, and 79 % of these.
LARGER_AT: Final = 1600
# From this step on half of the clips have 7 to 32 frames.
LONG_CLIPS_AT: Final = 2100
# From this step on more clips move: of six kinds drawn one did, and by then half of what was wrong
# about held-out clips was whether or where a thing moves.
LAST_AT: Final = 2600
# What pictures of three things, windows through a codec and clips of any pace are of all.
_THREE: Final = 0.4
_CODED: Final = 0.3
_ANY_STEP: Final = 0.3


# What each micro-batch counts: pictures were learnt last, and come as two.
_WEIGHTS: Final = {"pictures": 0.8, "large": 0.6, "clips": 1.0, "windows": 1.0}


@dataclass(frozen=True)
class Sizes:
    """How much one step holds.

    `pictures` have 70 tokens, `large_pictures` 280. There are at most `clips` clips, and at most
    `frames` frames in all of them. In `long_clips` of the steps the clips have 7 to 32 frames, in
    the others as many as held-out ones.
    """

    pictures: int
    large_pictures: int
    windows: int
    clips: int
    frames: int
    long_clips: float = 0.0


def auxiliary_weight(step: int) -> float:
    """Return what the labels on patches and frames count beside the answers.

    They shape the middle layers first. At 0.3 their loss is six times that of the answers by step 2000.
    """
    return 0.3 if step < FULL_AT else 0.1 if step < LARGER_AT else 0.04


_EARLY: Final = Sizes(pictures=12, large_pictures=3, windows=9, clips=5, frames=24)
_FULL: Final = Sizes(pictures=16, large_pictures=5, windows=11, clips=14, frames=42)
_LARGER: Final = replace(_FULL, pictures=14, large_pictures=7)
_LONG_CLIPS: Final = replace(_LARGER, windows=15, clips=12, frames=52, long_clips=0.5)
_LAST: Final = replace(_LONG_CLIPS, pictures=18, large_pictures=8, windows=10)


def sizes(step: int) -> Sizes:
    """Return the batch sizes of a step."""
    begun = {
        LAST_AT: _LAST,
        LONG_CLIPS_AT: _LONG_CLIPS,
        LARGER_AT: _LARGER,
        FULL_AT: _FULL,
        0: _EARLY,
    }
    return next(counts for first, counts in begun.items() if step >= first)


def maybe_compress(pixels: Pixels, rng: np.random.Generator, chance: float = 0.3) -> Pixels:
    """Send some pictures through JPEG at quality 50 to 95."""
    if rng.random() >= chance:
        return pixels
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(50, 96)))
    return np.asarray(Image.open(stream))


def patch_labels(
    things: list[tuple[Thing, float, float]],
    grid: tuple[int, int],
    size: tuple[int, int],
    contours: bool,
) -> dict[str, NDArray[np.int64]]:
    """Name the thing in each patch, given (thing, x, y): 0 none, -1 about its rim.

    `grid` is (columns, rows), `size` (width, height) in px.
    """
    (columns, rows), (width, height) = grid, size
    centres = positions(columns, rows) + 0.5
    x = centres[:, 0] / columns * width
    y = centres[:, 1] / rows * height
    labels = {k: np.zeros(len(centres), dtype=np.int64) for k in PATCH_CLASSES}
    for order, (thing, thing_x, thing_y) in enumerate(things, start=1):
        radius = thing.radius * min(width, height)
        distance = np.hypot(x - thing_x * width, y - thing_y * height)
        patch = width / columns / 2
        reach = radius + 0.7 * patch if contours else max(0.85 * radius, 0.75 * patch)
        inside = distance < reach
        rim = ~inside & (distance < radius + (1.5 if contours else 1.0) * patch)
        values = {
            "colour": _COLOUR_INDEX[thing.colour],
            "shape": _SHAPE_INDEX[thing.shape],
            "order": order,
        }
        for key, value in values.items():
            labels[key][rim] = -1
            labels[key][inside] = value
    return labels


def event_class(clip: generate_videos.Clip, time_s: float, before_s: float | None) -> int:
    """Name what has happened to the thing in a frame, `before_s` being the frame before it.

    1 first frame, 2 nothing, 3 to 6 moved (right, left, down, up), 7 just appeared, 8 just changed.
    """
    if before_s is None:
        return 1
    if clip.kind == "moves":
        return 3 + list(generate_videos.DIRECTIONS).index(clip.direction)
    if clip.kind in ("appears", "changes") and before_s < clip.event_s <= time_s:
        return 7 if clip.kind == "appears" else 8
    return 2


def frame_labels(recording: Recording, frames: int) -> dict[str, NDArray[np.int64]]:
    """Name the word that has just ended and how many there were, in the frames at its end."""
    labels = {k: np.zeros(frames, dtype=np.int64) for k in FRAME_CLASSES}
    starts = [word.start_s for word in recording.words] + [1e9]
    for order, word in enumerate(recording.words, start=1):
        after = starts[order]
        begin = int(word.start_s * SAMPLE_RATE_HZ / FRAME_SAMPLES)
        end = int(word.end_s * SAMPLE_RATE_HZ / FRAME_SAMPLES)
        stop = min(end + 3, int(after * SAMPLE_RATE_HZ / FRAME_SAMPLES) + 1, frames)
        for key, value in (("word", _WORD_INDEX[word.text]), ("order", order)):
            labels[key][begin:end] = -1
            labels[key][end:stop] = value
    return labels


def _vision_batch(
    rows: list[sequences.Sequence],
    values: list[NDArray[np.float16]],
    xy: list[NDArray[np.int64]],
    labels: list[dict[str, NDArray[np.int64]]],
) -> Batch:
    batch: Batch = dict(sequences.stack(rows))
    batch["features"] = np.concatenate(values)
    batch["xy"] = np.concatenate(xy)
    for key in PATCH_CLASSES:
        batch[f"label_{key}"] = np.concatenate([each[key] for each in labels])
    return batch


def picture_batch(
    rng: np.random.Generator, count: int, budget: int, contours: bool = True
) -> Batch:
    """Draw pictures, each with the dense instruction and one of the two short ones."""
    rows, values, xy, labels = [], [], [], []
    for _ in range(count):
        scene, pixels = generate_images.draw_picture(rng, _THREE)
        height, width = pixels.shape[:2]
        cut = patchify(maybe_compress(pixels, rng), budget)
        other = instructions.TAGS if rng.random() < 0.5 else instructions.CAPTION_SHORT
        asked = [
            (each, generate_images.answer(scene, each))
            for each in (instructions.CAPTION_DENSE, other)
        ]
        rows.append(sequences.of_image(len(cut.values), asked))
        values.append(features.patch_features(cut.values))
        xy.append(positions(cut.columns, cut.rows))
        things = [(thing, thing.x, thing.y) for thing in scene.things]
        labels.append(patch_labels(things, (cut.columns, cut.rows), (width, height), contours))
    return _vision_batch(rows, values, xy, labels)


def draw_frame_count(rng: np.random.Generator) -> int:
    """Draw 2 to 32 frames, mostly few; a whole batch shares the number."""
    kind = rng.random()
    if kind < 0.72:
        return int(rng.integers(2, 7))
    if kind < 0.92:
        return int(rng.integers(7, 13))
    return int(rng.integers(13, 33))


def clip_batch(
    rng: np.random.Generator,
    counts: Sizes,
    contours: bool = True,
    with_events: bool = True,
    kinds: tuple[str, ...] = generate_videos.EVENTFUL,
) -> Batch:
    """Draw clips with both video instructions; many frames mean fewer clips."""
    long = counts.long_clips > 0 and rng.random() < counts.long_clips
    frames = int(rng.integers(7, 33)) if long else draw_frame_count(rng)
    count = max(1, min(counts.clips, counts.frames // frames))
    rows, values, xy, labels, events, seconds = [], [], [], [], [], []
    for _ in range(count):
        clip, stamps, start, pictures = generate_videos.draw_sampled_clip(
            rng, frames, kinds=kinds, any_step=_ANY_STEP
        )
        height, width = pictures[0].shape[:2]
        compress = rng.random() < 0.5
        before_s: float | None = None
        for picture, stamp in zip(pictures, stamps, strict=True):
            sent = maybe_compress(picture, rng, 1.0) if compress else picture
            cut = patchify(sent, 70)
            values.append(features.patch_features(cut.values))
            xy.append(positions(cut.columns, cut.rows))
            thing, x, y = clip.state(stamp - start)
            things = [(thing, x, y)] if thing is not None else []
            labels.append(patch_labels(things, (cut.columns, cut.rows), (width, height), contours))
            event = event_class(clip, stamp - start, before_s)
            there = labels[-1]["order"] > 0
            events.append(np.where(there, event, labels[-1]["order"]))
            seconds.append(np.full(len(there), int(stamp) % 60))
            before_s = stamp - start
        asked = [
            (each, generate_videos.answer(clip, each, stamps, start))
            for each in instructions.VIDEO.values()
        ]
        rows.append(sequences.of_video(len(cut.values), stamps, asked))
    batch = _vision_batch(rows, values, xy, labels)
    if with_events:
        batch["label_event"] = np.concatenate(events)
        batch["label_second"] = np.concatenate(seconds)
    return batch


def window_batch(
    rng: np.random.Generator,
    bank: Bank,
    coded: list[Recording],
    count: int,
    max_words: int,
) -> Batch:
    """Draw spoken windows: some went through a codec, half of the others have their words varied."""
    rows, frames, labels = [], [], []
    for _ in range(count):
        recording = None
        if rng.random() < _CODED:
            choice = coded[int(rng.integers(len(coded)))]
            recording = choice if len(choice.words) <= max_words else None
        if recording is None:
            vary = bool(rng.random() < 0.5)
            recording = generate_speech.draw_window(bank, rng, max_words, vary=vary)
        cut = features.audio_frames(recording.samples)
        instruction = str(rng.choice(list(instructions.AUDIO.values())))
        answer = generate_speech.answer(recording.words, instruction)
        rows.append(sequences.of_audio(len(cut), instruction, answer))
        frames.append(cut)
        labels.append(frame_labels(recording, len(cut)))
    batch: Batch = dict(sequences.stack(rows))
    batch["frames"] = np.concatenate(frames)
    for key in FRAME_CLASSES:
        batch[f"label_{key}"] = np.concatenate([each[key] for each in labels])
    return batch


class Steps(Dataset[dict[str, Batch]]):
    """The micro-batches of step number `step` of a seeded run, in two halves that cost the same.

    An item has pictures and clips, `side` large pictures and windows; if `whole`, an item has all.
    `bank` has the words that windows are put together from, `coded` windows through a codec.
    """

    def __init__(self, seed: int, bank: Bank, coded: list[Recording], whole: bool) -> None:
        self._seed = seed
        self._whole = whole
        self._bank = bank
        self._coded = coded

    def bidirectional(self, step: int) -> bool:
        """Return whether the patches of a picture see each other in this step."""
        return bool(np.random.default_rng((self._seed, step, 1)).random() < 0.5)

    def __getitem__(self, step: int) -> dict[str, Batch]:
        rng = np.random.default_rng((self._seed, step))
        counts = sizes(step)
        contours = step >= CONTOURS_AT
        kinds = generate_videos.EVENTFUL + (("moves", "moves") if step >= LAST_AT else ())
        batches = {
            "pictures": picture_batch(rng, counts.pictures, 70, contours),
            "clips": clip_batch(rng, counts, contours, step >= EVENTS_AT, kinds),
        }
        return self._weighted(batches, step) | (self.side(step) if self._whole else {})

    def side(self, step: int) -> dict[str, Batch]:
        """Return the other half of a step."""
        rng = np.random.default_rng((self._seed, step, 2))
        counts = sizes(step)
        max_words = min(MAX_WORDS, 2 + step * 11 // ALL_WORDS_AT)
        batches = {
            "large": picture_batch(rng, counts.large_pictures, 280, step >= CONTOURS_AT),
            "windows": window_batch(rng, self._bank, self._coded, counts.windows, max_words),
        }
        return self._weighted(batches, step)

    def _weighted(self, batches: dict[str, Batch], step: int) -> dict[str, Batch]:
        auxiliary = np.array(auxiliary_weight(step), dtype=np.float32)
        return {
            name: batch
            | {"weight": np.array(_WEIGHTS[name], np.float32), "auxiliary_weight": auxiliary}
            for name, batch in batches.items()
        }
