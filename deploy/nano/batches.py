"""Training batches: a pure function of (seed, step), so an interrupted run goes on where it was.

A step is three micro-batches: pictures, clips of frames, spoken windows. Each is a dict of
arrays: the fields of `sequences.stack`, plus `features` float16 [n, 160] and `xy` int64 [n, 2]
for vision or `frames` float32 [n, 640] for audio, in the order of the placeholders, plus the
labels of the auxiliary losses (class per patch or frame, -1 where there is none).
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
from deploy.nano.generate_images import Pixels, Thing
from deploy.nano.generate_speech import MAX_WORDS, Recording
from deploy.nano.speech_bank import SAMPLE_RATE_HZ, Bank
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
# From this step on the patches of a moving or changing thing are labelled with what happens to it.
EVENTS_AT: Final = 1000
# From this step on each word is played a little differently: 4000 takes are few enough to be
# learnt by heart, and held-out takes then fall behind (97 % of the tokens right against 91 %).
VARIED_AT: Final = 1300
# From this step on everything is drawn the second way: words from the wide bank (24000 takes, so
# that few are met twice), more pictures of three things, more clips with an event and any pace of
# frames, and each patch is labelled with its frame's second: at this step the second of an event
# was wrong in three clips of four (no patch knew its own), and all else about clips was learnt.
WIDE_AT: Final = 2000
_THREE: Final = 0.4
_ANY_STEP: Final = 0.3
# From these steps on, while the rate goes down, more of the pictures have 280 tokens: by step 2750,
# 96 % of those with 70 were right and 79 % of these.
SETTLED_AT: Final = 2400
LARGER_AT: Final = 2900
# From this step on most clips have 7 to 32 frames: by then all 76 held-out clips of fewer were
# described right, and 32 of 37 longer ones.
LONG_CLIPS_AT: Final = 3600


@dataclass(frozen=True)
class Sizes:
    """How much one step holds.

    There are at most `clips` clips, and at most `frames` frames in all of them. Every
    `large_every`-th step the pictures have 280 tokens, and are `large_pictures`. In `long_clips`
    of the steps the clips have 7 to 32 frames, in the others as many as held-out ones.
    """

    pictures: int
    large_pictures: int
    windows: int
    clips: int
    frames: int
    large_every: int = 5
    long_clips: float = 0.0


def auxiliary_weight(step: int) -> float:
    """Return what the labels on patches and frames count beside the answers.

    They shape the middle layers first. At 0.3 their loss is six times that of the answers by step 2000.
    """
    return 0.3 if step < WIDE_AT else 0.1 if step < SETTLED_AT else 0.04


# Speech is learnt by step 1000 or so, shapes take longer: the weight moves to pictures and clips.
_EARLY: Final = Sizes(pictures=16, large_pictures=6, windows=10, clips=4, frames=20)
_LATE: Final = Sizes(pictures=20, large_pictures=8, windows=7, clips=6, frames=30)
_LATE_AT: Final = 1000
_WIDE: Final = Sizes(pictures=26, large_pictures=9, windows=12, clips=14, frames=42, large_every=4)

_SETTLED: Final = replace(_WIDE, large_pictures=10, large_every=3)
_LARGER: Final = replace(_WIDE, large_pictures=12, large_every=2)
_LONG_CLIPS: Final = Sizes(
    pictures=16, large_pictures=6, windows=9, clips=8, frames=64, large_every=2, long_clips=0.7
)


def sizes(step: int) -> Sizes:
    """Return the batch sizes of a step."""
    begun = {
        LONG_CLIPS_AT: _LONG_CLIPS,
        LARGER_AT: _LARGER,
        SETTLED_AT: _SETTLED,
        WIDE_AT: _WIDE,
        _LATE_AT: _LATE,
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
    rng: np.random.Generator, count: int, budget: int, contours: bool = True, three: float = 0.0
) -> Batch:
    """Draw pictures, each with the dense instruction and one of the two short ones."""
    rows, values, xy, labels = [], [], [], []
    for _ in range(count):
        scene, pixels = generate_images.draw_picture(rng, three)
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
    wide: bool = True,
) -> Batch:
    """Draw clips with both video instructions; many frames mean fewer clips."""
    long = counts.long_clips > 0 and rng.random() < counts.long_clips
    frames = int(rng.integers(7, 33)) if long else draw_frame_count(rng)
    count = max(1, min(counts.clips, counts.frames // frames))
    kinds = generate_videos.EVENTFUL if wide else generate_videos.KINDS
    any_step = _ANY_STEP if wide else 0.0
    rows, values, xy, labels, events, seconds = [], [], [], [], [], []
    for _ in range(count):
        clip, stamps, start, pictures = generate_videos.draw_sampled_clip(
            rng, frames, kinds=kinds, any_step=any_step
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
    if wide:
        batch["label_second"] = np.concatenate(seconds)
    return batch


def window_batch(
    rng: np.random.Generator,
    bank: Bank,
    coded: list[Recording],
    count: int,
    max_words: int,
    vary: bool = True,
    wide: bool = True,
) -> Batch:
    """Draw spoken windows, a fifth to a third of them from those that went through a codec."""
    rows, frames, labels = [], [], []
    for _ in range(count):
        recording = None
        varied = vary and (not wide or rng.random() < 0.5)
        if rng.random() < (0.3 if wide else 0.2 if vary else 0.35):
            choice = coded[int(rng.integers(len(coded)))]
            recording = choice if len(choice.words) <= max_words else None
        if recording is None:
            recording = generate_speech.draw_window(bank, rng, max_words, vary=varied)
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


@dataclass(frozen=True)
class Speech:
    """Words to put windows together from, and windows that went through a codec."""

    bank: Bank
    coded: list[Recording]


class Steps(Dataset[dict[str, Batch]]):
    """The vision batches of step number `step` of a seeded run; `windows` gives the spoken one.

    `narrow` is what is spoken before step WIDE_AT, `wide` from then on.
    """

    def __init__(self, seed: int, narrow: Speech, wide: Speech) -> None:
        self._seed = seed
        self._narrow = narrow
        self._wide = wide

    def __getitem__(self, step: int) -> dict[str, Batch]:
        rng = np.random.default_rng((self._seed, step))
        counts = sizes(step)
        contours, wide = step >= CONTOURS_AT, step >= WIDE_AT
        large = step % counts.large_every == counts.large_every - 1
        count = counts.large_pictures if large else counts.pictures
        three = _THREE if wide else 0.0
        batches = {
            "pictures": picture_batch(rng, count, 280 if large else 70, contours, three),
            "clips": clip_batch(rng, counts, contours, step >= EVENTS_AT, wide),
        }
        return {name: self._weighted(batch, step) for name, batch in batches.items()}

    def _weighted(self, batch: Batch, step: int) -> Batch:
        return batch | {"auxiliary_weight": np.array(auxiliary_weight(step), dtype=np.float32)}

    def windows(self, step: int) -> Batch:
        """Return the spoken windows of a step."""
        rng = np.random.default_rng((self._seed, step, 2))
        max_words = min(MAX_WORDS, 2 + step * 11 // ALL_WORDS_AT)
        count, vary, wide = sizes(step).windows, step >= VARIED_AT, step >= WIDE_AT
        speech = self._wide if wide else self._narrow
        batch = window_batch(rng, speech.bank, speech.coded, count, max_words, vary, wide)
        return self._weighted(batch, step)
