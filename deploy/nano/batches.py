"""Training batches: a pure function of (seed, step), so an interrupted run goes on where it was.

A step is four micro-batches: pictures of 70 tokens, pictures of 280, clips of frames, spoken windows.
Each is a dict of arrays: the fields of `sequences.stack`, plus `features` float16 [n, 160] and `xy`
int64 [n, 2] for vision or `frames` float32 [n, 640] for audio, in the order of the placeholders,
plus the labels of the auxiliary losses: a class per patch or frame, -1 where there is none, and for
patches two numbers, NaN where there are none.
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
# What patches are asked for in numbers, (x, y) in halves of the picture: where they are, and how far
# their thing has come since the first frame. Without the first they forget their row by the middle
# layers, and what moves up or down is then not told from what stays.
PATCH_NUMBERS: Final = ("place", "moved")
# Words of a window with pauses: the product's own hold more words than the held-out ones.
MOST_WORDS: Final = 16
FRAME_CLASSES: Final = {"word": len(SPOKEN) + 1, "order": MOST_WORDS + 1}

# Audio starts with windows of two words and reaches all twelve at this step.
ALL_WORDS_AT: Final = 400
# From this step on the patches at a thing's rim are labelled too (hues first, then contours), those of
# a moving or changing thing with what happens to it, and every patch of a clip with its frame's
# second: without those 2000 steps did not teach events or their times.
DETAILS_AT: Final = 300
# Until this step clips have two or three frames: what moves is learnt from few.
MORE_FRAMES_AT: Final = 800
# From this step on the labels of patches count less.
FAINT_LABELS_AT: Final = 1000
# From this step on, while the rate goes down, a step holds more, many clips are long and windows have
# pauses.
LATE_AT: Final = 1200
# From this step on a step has fewer windows, which are learnt first, and more of what is learnt last:
# pictures of 280 and long clips.
LAST_AT: Final = 2500
# What pictures of three things, windows through a codec, clips of any pace, windows with pauses and
# words that are the one before are of all.
_THREE: Final = 0.4
_CODED: Final = 0.3
_ANY_STEP: Final = 0.3
_PAUSES: Final = 0.2
_AGAIN: Final = 0.1
# The largest pictures take long to paint, and are scaled down to the same patches.
_LARGEST_PX: Final = 900


# What each micro-batch counts: pictures were learnt last, and come as two.
_WEIGHTS: Final = {"pictures": 0.8, "large": 0.6, "clips": 1.0, "windows": 1.0}


@dataclass(frozen=True)
class Sizes:
    """How much one step holds.

    `pictures` have 70 tokens, `large_pictures` 280. There are at most `clips` clips, and at most
    `frames` frames in all of them. In `long_clips` of the steps the clips have 7 to 32 frames, in
    the others as many as held-out ones. `pauses` is the share of the windows with pauses.
    """

    pictures: int
    large_pictures: int
    windows: int
    clips: int
    frames: int
    long_clips: float = 0.0
    pauses: float = 0.0


def auxiliary_weight(name: str, step: int) -> float:
    """Return what the labels on patches and frames count beside the answers in a micro-batch.

    They shape the middle layers first. Those on patches must fade: at 0.3 their loss is six times that
    of the answers by step 2000. Those on spoken words must not: less of each window is then right.
    """
    if name == "windows":
        return 0.7
    return 0.3 if step < FAINT_LABELS_AT else 0.1 if step < LATE_AT else 0.04


_EARLY: Final = Sizes(pictures=12, large_pictures=3, windows=13, clips=14, frames=24)
_LATE: Final = replace(
    _EARLY, pictures=15, large_pictures=5, windows=16, frames=30, long_clips=0.4, pauses=_PAUSES
)
_LAST: Final = replace(_LATE, pictures=16, large_pictures=9, windows=11, frames=32, long_clips=0.7)


def sizes(step: int) -> Sizes:
    """Return the batch sizes of a step."""
    return _EARLY if step < LATE_AT else _LATE if step < LAST_AT else _LAST


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
    details: bool,
) -> dict[str, NDArray[np.int64]]:
    """Name the thing in each patch, given (thing, x, y): 0 none, -1 about its rim.

    `grid` is (columns, rows), `size` (width, height) in px. With `details` the rim is narrow.
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
        reach = radius + 0.7 * patch if details else max(0.85 * radius, 0.75 * patch)
        inside = distance < reach
        rim = ~inside & (distance < radius + (1.5 if details else 1.0) * patch)
        values = {
            "colour": _COLOUR_INDEX[thing.colour],
            "shape": _SHAPE_INDEX[thing.shape],
            "order": order,
        }
        for key, value in values.items():
            labels[key][rim] = -1
            labels[key][inside] = value
    return labels


def places(columns: int, rows: int) -> NDArray[np.float32]:
    """Return the centres of patches as (x, y) [n, 2], -1 to 1 from edge to edge."""
    return ((positions(columns, rows) + 0.5) / (columns, rows) * 2 - 1).astype(np.float32)


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
    batch["label_place"] = np.concatenate([places(*(grid.max(0) + 1)) for grid in xy])
    for key in PATCH_CLASSES:
        batch[f"label_{key}"] = np.concatenate([each[key] for each in labels])
    return batch


def picture_batch(rng: np.random.Generator, count: int, budget: int, details: bool = True) -> Batch:
    """Draw pictures, each with two of the three instructions."""
    rows, values, xy, labels = [], [], [], []
    for _ in range(count):
        scene, pixels = generate_images.draw_picture(rng, _THREE, _LARGEST_PX)
        height, width = pixels.shape[:2]
        cut = patchify(maybe_compress(pixels, rng), budget)
        chosen = rng.choice(list(instructions.IMAGE.values()), 2, replace=False)
        asked = [(str(each), generate_images.answer(scene, str(each))) for each in chosen]
        rows.append(sequences.of_image(len(cut.values), asked))
        values.append(features.patch_features(cut.values))
        xy.append(positions(cut.columns, cut.rows))
        things = [(thing, thing.x, thing.y) for thing in scene.things]
        labels.append(patch_labels(things, (cut.columns, cut.rows), (width, height), details))
    return _vision_batch(rows, values, xy, labels)


def draw_frame_count(rng: np.random.Generator) -> int:
    """Draw 2 to 32 frames, mostly few."""
    kind = rng.random()
    if kind < 0.72:
        return int(rng.integers(2, 7))
    if kind < 0.92:
        return int(rng.integers(7, 13))
    return int(rng.integers(13, 33))


def clip_batch(rng: np.random.Generator, counts: Sizes, frames: int, details: bool = True) -> Batch:
    """Draw clips of `frames` frames with both video instructions; many frames mean fewer clips."""
    count = max(1, min(counts.clips, counts.frames // frames))
    rows, values, xy, labels, moved, events, seconds = [], [], [], [], [], [], []
    for _ in range(count):
        clip, stamps, start, pictures = generate_videos.draw_sampled_clip(
            rng, frames, kinds=generate_videos.EVENTFUL, any_step=_ANY_STEP
        )
        height, width = pictures[0].shape[:2]
        compress = rng.random() < 0.5
        _, first_x, first_y = clip.state(0.0)
        before_s: float | None = None
        for picture, stamp in zip(pictures, stamps, strict=True):
            sent = maybe_compress(picture, rng, 1.0) if compress else picture
            cut = patchify(sent, 70)
            values.append(features.patch_features(cut.values))
            xy.append(positions(cut.columns, cut.rows))
            thing, x, y = clip.state(stamp - start)
            things = [(thing, x, y)] if thing is not None else []
            labels.append(patch_labels(things, (cut.columns, cut.rows), (width, height), details))
            event = event_class(clip, stamp - start, before_s)
            there = labels[-1]["order"] > 0
            come = np.array([x - first_x, y - first_y], np.float32) * 2
            moved.append(np.where(there[:, None], come, np.float32(np.nan)))
            events.append(np.where(there, event, labels[-1]["order"]))
            seconds.append(np.full(len(there), int(stamp) % 60))
            before_s = stamp - start
        asked = [
            (each, generate_videos.answer(clip, each, stamps, start))
            for each in instructions.VIDEO.values()
        ]
        rows.append(sequences.of_video(len(cut.values), stamps, asked))
    batch = _vision_batch(rows, values, xy, labels)
    batch["label_moved"] = np.concatenate(moved)
    if details:
        batch["label_event"] = np.concatenate(events)
        batch["label_second"] = np.concatenate(seconds)
    return batch


def window_batch(
    rng: np.random.Generator,
    bank: Bank,
    coded: list[Recording],
    count: int,
    max_words: int,
    pauses: float = 0.0,
) -> Batch:
    """Draw spoken windows: some went through a codec, half of the others have their words varied.

    Of these others a share of `pauses` has pauses between its words, and up to MOST_WORDS.
    """
    rows, frames, labels = [], [], []
    for _ in range(count):
        recording = None
        if rng.random() < _CODED:
            choice = coded[int(rng.integers(len(coded)))]
            recording = choice if len(choice.words) <= max_words else None
        if recording is None:
            vary = bool(rng.random() < 0.5)
            with_pauses = bool(rng.random() < pauses)
            recording = generate_speech.draw_window(
                bank,
                rng,
                MOST_WORDS if with_pauses else max_words,
                vary=vary,
                again=_AGAIN,
                pauses=with_pauses,
            )
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
        details = step >= DETAILS_AT
        if step < MORE_FRAMES_AT:
            frames = int(rng.integers(2, 4))
        elif rng.random() < counts.long_clips:
            frames = int(rng.integers(7, 33))
        else:
            frames = draw_frame_count(rng)
        batches = {
            "pictures": picture_batch(rng, counts.pictures, 70, details),
            "clips": clip_batch(rng, counts, frames, details),
        }
        return self._weighted(batches, step) | (self.side(step) if self._whole else {})

    def side(self, step: int) -> dict[str, Batch]:
        """Return the other half of a step."""
        rng = np.random.default_rng((self._seed, step, 2))
        counts = sizes(step)
        max_words = min(MAX_WORDS, 2 + step * 10 // ALL_WORDS_AT)
        batches = {
            "large": picture_batch(rng, counts.large_pictures, 280, step >= DETAILS_AT),
            "windows": window_batch(
                rng, self._bank, self._coded, counts.windows, max_words, counts.pauses
            ),
        }
        return self._weighted(batches, step)

    def _weighted(self, batches: dict[str, Batch], step: int) -> dict[str, Batch]:
        return {
            name: batch
            | {
                "weight": np.array(_WEIGHTS[name], np.float32),
                "auxiliary_weight": np.array(auxiliary_weight(name, step), np.float32),
            }
            for name, batch in batches.items()
        }
