"""Clips of one shape that moves, appears or changes colour, and longer videos cut into shots.

A clip is a function of time, so it can be sampled at any frame rate; what is asked about it is
answered for the moments that were sampled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from deploy.nano import instructions
from deploy.nano.generate_images import (
    Floats,
    Pixels,
    Thing,
    draw_scene,
    paint_background,
    paint_of,
    painted,
    place,
    to_pixels,
)
from deploy.nano.words import COLOURS, article

DIRECTIONS: Final = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
KINDS: Final = ("moves", "moves", "appears", "changes", "still")
# For training: the time of an event takes more clips to learn than that a thing stays still.
EVENTFUL: Final = ("moves", "appears", "changes", "moves", "appears", "changes", "moves", "still")
ASPECTS: Final = (1.0, 4 / 3, 16 / 9, 9 / 16)


@dataclass(frozen=True)
class Clip:
    """One shot. Positions are fractions; times count from the clip's start.

    `direction` is set for "moves", `event_s` for "appears" and "changes", `after` is the thing
    from `event_s` on for "changes".
    """

    kind: str
    thing: Thing
    background: str
    seed: int
    duration_s: float
    direction: str = ""
    event_s: float = 0.0
    after: Thing | None = None

    def state(self, time_s: float) -> tuple[Thing | None, float, float]:
        """Return the thing that is visible and its place at a time."""
        thing = self.thing
        if self.kind == "appears" and time_s < self.event_s:
            return None, thing.x, thing.y
        if self.kind == "changes" and time_s >= self.event_s and self.after is not None:
            thing = self.after
        if self.kind == "moves":
            dx, dy = DIRECTIONS[self.direction]
            along = 0.52 * (time_s / self.duration_s - 0.5)
            return thing, thing.x + dx * along, thing.y + dy * along
        return thing, thing.x, thing.y


def draw_clip(
    rng: np.random.Generator, duration_s: float, aspect: float, kinds: tuple[str, ...] = KINDS
) -> Clip:
    """Draw a clip of one of the kinds; an event lies between 5 % and 95 % of its duration."""
    kind = str(rng.choice(kinds))
    while True:
        scene = draw_scene(rng, aspect, count=1)
        thing = scene.things[0]
        if kind != "moves" and thing.radius < 0.33:
            break
        # Room for a quarter of the picture either way.
        if kind == "moves" and thing.radius < 0.22:
            thing = replace(
                thing, x=float(rng.uniform(0.42, 0.58)), y=float(rng.uniform(0.42, 0.58))
            )
            break
    clip = Clip(kind, thing, scene.background, scene.seed, duration_s)
    if kind == "moves":
        return replace(clip, direction=str(rng.choice(list(DIRECTIONS))))
    clip = replace(clip, event_s=float(rng.uniform(0.05, 0.95)) * duration_s)
    if kind == "changes":
        others = [c for c in COLOURS if c not in (thing.colour, scene.background)]
        colour = str(rng.choice(others))
        clip = replace(clip, after=replace(thing, colour=colour, paint=paint_of(colour, rng)))
    return clip


def clock(time_s: float) -> str:
    """Return mm:ss, seconds cut down, as the processor writes a frame's time."""
    return f"{int(time_s // 60):02d}:{int(time_s % 60):02d}"


def answer(clip: Clip, instruction: str, stamps_s: list[float], start_s: float = 0.0) -> str:
    """Return what the checkpoint is trained to say of the frames sampled at `stamps_s`.

    `stamps_s` are times in the whole video, which shows the clip from `start_s` on.
    """
    if instruction == instructions.VIDEO_SHORT:
        return clip.thing.name
    name = article(clip.thing.name)
    if clip.kind == "moves":
        return f"{name} moves {clip.direction}"
    if clip.kind == "still":
        return f"{name} stays still"
    seen = next(s for s in stamps_s if s - start_s >= clip.event_s)
    if clip.kind == "appears":
        return f"{name} appears at {clock(seen)}"
    colour = clip.after.colour if clip.after else ""
    return f"{name} changes to {colour} at {clock(seen)}"


@dataclass(frozen=True)
class Painter:
    """Paints frames of a clip over a background painted once: only what the thing covers is new."""

    clip: Clip
    canvas: Floats
    pixels: Pixels

    @classmethod
    def of(cls, clip: Clip, width: int, height: int) -> "Painter":
        """Paint the background."""
        canvas = paint_background(clip.background, width, height, clip.seed)
        return cls(clip, canvas, to_pixels(canvas))

    def frame(self, time_s: float) -> Pixels:
        """Paint one frame, uint8 RGB [height, width, 3]."""
        frame = self.pixels.copy()
        thing, x, y = self.clip.state(time_s)
        height, width = frame.shape[:2]
        if thing is not None and (placed := place(thing, x, y, width, height)) is not None:
            part, covered = placed
            frame[part] = to_pixels(painted(self.canvas[part], thing, covered))
        return frame


def render(clip: Clip, width: int, height: int, times_s: list[float]) -> list[Pixels]:
    """Paint the clip at the given times."""
    painter = Painter.of(clip, width, height)
    return [painter.frame(time_s) for time_s in times_s]


def draw_stamps(
    rng: np.random.Generator, count: int, any_step: float = 0.0
) -> tuple[float, list[float]]:
    """Draw where a clip starts in its video and `count` evenly spaced frame times, in s.

    With chance `any_step` the frames are any time from 0.4 to 5 s apart.
    """
    step = float(rng.choice([0.5, 1.0, 1.0, 1.0, 1.5, 2.0, 3.0, 5.0]))
    if any_step and rng.random() < any_step:
        step = float(rng.uniform(0.4, 5.0))
    kind = rng.random()
    start = 0.0 if kind < 0.5 else float(rng.uniform(0, 120 if kind < 0.8 else 3400))
    return start, [start + step * index for index in range(count)]


def draw_sampled_clip(
    rng: np.random.Generator,
    count: int,
    side: int = 384,
    kinds: tuple[str, ...] = KINDS,
    any_step: float = 0.0,
) -> tuple[Clip, list[float], float, list[Pixels]]:
    """Draw a clip seen in `count` frames: clip, stamps, start and frames.

    An event falls between two frames, so the first frame shows the state before it.
    """
    aspect = float(rng.choice(ASPECTS))
    start, stamps = draw_stamps(rng, count, any_step)
    span = stamps[-1] - stamps[0]
    clip = draw_clip(rng, span, aspect, kinds)
    if clip.kind in ("appears", "changes"):
        index = int(rng.integers(1, count))
        clip = replace(clip, event_s=stamps[index] - start - 1e-3)
    width, height = round(side * aspect**0.5), round(side / aspect**0.5)
    return clip, stamps, start, render(clip, width, height, [s - start for s in stamps])


@dataclass(frozen=True)
class Shot:
    """A clip's place in a longer video."""

    clip: Clip
    start_s: float
    end_s: float


def frames(shots: list[Shot], width: int, height: int, fps: float) -> Iterator[Pixels]:
    """Paint every frame of the shots in order, uint8 RGB [height, width, 3]."""
    index = 0
    for shot in shots:
        painter = Painter.of(shot.clip, width, height)
        while index / fps < shot.end_s:
            yield painter.frame(index / fps - shot.start_s)
            index += 1
