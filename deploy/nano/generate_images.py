"""Pictures of one to three coloured shapes, with the answer to each image instruction.

A scene is drawn from a seeded generator, `render` paints it at any size, and `answer` says what
the checkpoint is trained to say about it. Scenes hold fractions, never pixels, so one scene can
be painted small for training and large for a sample.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deploy.nano import instructions
from deploy.nano.words import BACKGROUNDS, COLOURS, SHAPES, article

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

_SUPERSAMPLING: Final = 4
# A shape must span about two of the 64 patches of a small budget to be told from the others.
_SMALLEST_RADIUS: Final = 0.105


@dataclass(frozen=True)
class Thing:
    """A shape: centre and radius in fractions of width, height and the shorter side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle_rad: float
    paint: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The two words that name it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order along one axis, on a background."""

    things: tuple[Thing, ...]
    background: str
    vertical: bool
    seed: int


def paint_of(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a shade of the colour: its hue kept, lightness and saturation varied."""
    base = np.array(COLOURS[colour], dtype=np.float32)
    grey = base.mean()
    mixed = grey + (base - grey) * rng.uniform(0.8, 1.1)
    shaded = np.clip(mixed * rng.uniform(0.75, 1.1) + rng.uniform(-6, 6, 3), 0, 255)
    red, green, blue = (int(v) for v in shaded)
    return red, green, blue


def draw_scene(rng: np.random.Generator, aspect: float, count: int | None = None) -> Scene:
    """Draw a scene for a picture of the given aspect (width / height)."""
    count = count or int(rng.integers(1, 4))
    vertical = bool(rng.random() < 0.5)
    # In units of the shorter side, the picture measures width x height.
    width, height = max(aspect, 1.0), max(1.0 / aspect, 1.0)
    smallest = _SMALLEST_RADIUS * math.sqrt(width * height)
    if smallest > 0.40 * (height if vertical else width) / count:
        vertical = not vertical
    along = height if vertical else width
    across = width if vertical else height
    largest = min(0.36, 0.42 * along / count)
    radii = [float(rng.uniform(smallest, max(smallest, largest))) for _ in range(count)]
    while sum(radii) > 0.46 * along:
        radii = [max(smallest * 0.95, r * 0.9) for r in radii]
    spare = along - 2 * sum(radii)
    cuts = np.sort(rng.uniform(0, 1, count + 1))
    shares = np.diff(np.concatenate([[0.0], cuts, [1.0]]))[: count + 1]
    gaps = 0.04 * spare + 0.9 * spare * shares / max(shares.sum(), 1e-6) * 0.95
    background = str(rng.choice(BACKGROUNDS))
    palette = [c for c in COLOURS if c != background]
    position = 0.0
    things: list[Thing] = []
    previous: tuple[float, float] | None = None
    for index, radius in enumerate(radii):
        position += float(gaps[index]) + radius
        low, high = radius, max(across - radius, radius + 1e-3)
        if previous is not None:
            # Sideways by less than half the way along, so that one relation only is true.
            reach = 0.45 * (position - previous[0])
            low, high = max(low, previous[1] - reach), min(high, previous[1] + reach)
        side = float(rng.uniform(low, max(high, low + 1e-4)))
        previous = (position, side)
        x, y = (side, position) if vertical else (position, side)
        colour = str(rng.choice(palette))
        shape = str(rng.choice(SHAPES))
        turn = math.pi if shape in ("circle", "ring") else math.pi / 15
        things.append(
            Thing(
                colour=colour,
                shape=shape,
                x=x / width,
                y=y / height,
                radius=radius,
                angle_rad=float(rng.uniform(-turn, turn)),
                paint=paint_of(colour, rng),
            )
        )
        position += radius
    return Scene(tuple(things), background, vertical, int(rng.integers(2**31)))


def answer(scene: Scene, instruction: str) -> str:
    """Return what the checkpoint is trained to answer."""
    names = [thing.name for thing in scene.things]
    if instruction == instructions.TAGS:
        return ", ".join(names)
    noun_phrases = [article(name) for name in names]
    if instruction == instructions.CAPTION_SHORT:
        if len(noun_phrases) == 1:
            return noun_phrases[0]
        return ", ".join(noun_phrases[:-1]) + " and " + noun_phrases[-1]
    relation = " above " if scene.vertical else " left of "
    return f"{relation.join(noun_phrases)} on {article(scene.background)} background"


def outline(shape: str, angle_rad: float) -> list[tuple[float, float]]:
    """Return the corners of a unit-radius shape (ring and circle are drawn as ellipses)."""
    if shape == "square":
        corners = [(math.radians(a), 1.0) for a in (45, 135, 225, 315)]
    elif shape == "triangle":
        corners = [(math.radians(a), 1.0) for a in (-90, 30, 150)]
    elif shape == "star":
        corners = [(math.radians(-90 + 36 * k), 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    else:
        arm = 0.34
        points = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
        points += [(-a, -b) for a, b in points]
        corners = [(math.atan2(b, a), math.hypot(a, b) * 0.95) for a, b in points]
    return [(r * math.cos(t + angle_rad), r * math.sin(t + angle_rad)) for t, r in corners]


def coverage(shape: str, angle_rad: float, radius_px: float, dx: float, dy: float) -> Floats:
    """Return the shape's coverage [s, s] in 0..1, its centre (dx, dy) px off the tile's middle."""
    side = 2 * math.ceil(radius_px + 1) + 1
    scale = _SUPERSAMPLING if radius_px < 150 else 2
    tile = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(tile)
    cx, cy, r = (side / 2 + dx) * scale, (side / 2 + dy) * scale, radius_px * scale
    if shape in ("circle", "ring"):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            inner = 0.56 * r
            draw.ellipse((cx - inner, cy - inner, cx + inner, cy + inner), fill=0)
    else:
        draw.polygon([(cx + r * x, cy + r * y) for x, y in outline(shape, angle_rad)], fill=255)
    return np.asarray(tile.reduce(scale), dtype=np.float32) / 255.0


def _smooth_field(rng: np.random.Generator, width: int, height: int, cells: int) -> Floats:
    """Return smooth noise [height, width] with about `cells` bumps along a side."""
    coarse = rng.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    return np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC),
        dtype=np.float32,
    )


def paint_background(name: str, width: int, height: int, seed: int) -> Floats:
    """Return the background [height, width, 3], values around 0..255."""
    rng = np.random.default_rng(seed)
    if name in COLOURS:
        base = np.array(paint_of(name, rng), dtype=np.float32)
        tint = rng.uniform(0.35, 1.0)
        canvas = np.broadcast_to(base * tint + 215 * (1 - tint), (height, width, 3)).copy()
        if rng.random() < 0.5:
            slope = np.linspace(1 - rng.uniform(0, 0.15), 1.0, width, dtype=np.float32)
            canvas *= slope[None, :, None]
        return canvas
    level = rng.uniform(90, 190)
    grey = np.full((height, width), level, dtype=np.float32)
    tints: list[Floats] = []
    if name == "noisy":
        grain = rng.standard_normal((height, width)).astype(np.float32)
        grey += grain * np.float32(rng.uniform(18, 35))
    elif name == "mixed":
        for cells, weight in ((2, 26), (5, 16), (11, 11), (24, 7)):
            grey += weight * _smooth_field(rng, width, height, cells)
        tints = [9 * _smooth_field(rng, width, height, 3) for _ in range(3)]
        grey += rng.standard_normal((height, width)).astype(np.float32) * 2
    canvas = np.empty((height, width, 3), dtype=np.float32)
    for channel in range(3):
        canvas[:, :, channel] = grey + tints[channel] if tints else grey
    return canvas


def place(
    thing: Thing, x: float, y: float, width: int, height: int
) -> tuple[tuple[slice, slice], Floats] | None:
    """Return the part of a canvas that the thing at fractions (x, y) covers, and how much of it.

    The part is (rows, columns), its coverage is [rows, columns, 1]; None where it is outside.
    """
    radius_px = thing.radius * min(width, height)
    cx, cy = x * width, y * height
    left, top = math.floor(cx), math.floor(cy)
    alpha = coverage(thing.shape, thing.angle_rad, radius_px, cx - left - 0.5, cy - top - 0.5)
    half = alpha.shape[0] // 2
    x0, y0 = left - half, top - half
    ax0, ay0 = max(0, -x0), max(0, -y0)
    ax1 = min(alpha.shape[1], width - x0)
    ay1 = min(alpha.shape[0], height - y0)
    if ax1 <= ax0 or ay1 <= ay0:
        return None
    part = slice(y0 + ay0, y0 + ay1), slice(x0 + ax0, x0 + ax1)
    return part, alpha[ay0:ay1, ax0:ax1, None]


def painted(behind: Floats, thing: Thing, covered: Floats) -> Floats:
    """Return a part of a canvas with the thing over it."""
    return behind + covered * (np.array(thing.paint, dtype=np.float32) - behind)


def to_pixels(canvas: Floats) -> Pixels:
    """Round and clip to uint8."""
    rounded = canvas + np.float32(0.5)
    return np.clip(rounded, 0, 255, out=rounded).astype(np.uint8)


def render(scene: Scene, width: int, height: int) -> Pixels:
    """Paint the scene: uint8 RGB [height, width, 3]."""
    canvas = paint_background(scene.background, width, height, scene.seed)
    for thing in scene.things:
        if (placed := place(thing, thing.x, thing.y, width, height)) is not None:
            part, covered = placed
            canvas[part] = painted(canvas[part], thing, covered)
    return to_pixels(canvas)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw width and height in px: 48 to about 2000, aspect up to 5 to 1 either way."""
    kind = rng.random()
    if kind < 0.3:
        aspect = 1.0
    elif kind < 0.8:
        aspect = float(rng.choice([4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16]))
    else:
        aspect = float(np.exp(rng.uniform(-1.6, 1.6)))
    kind = rng.random()
    if kind < 0.1:
        side = rng.uniform(48, 140)
    elif kind < 0.95:
        side = rng.uniform(140, 640)
    else:
        side = rng.uniform(640, 2000)
    width = max(48, round(side * math.sqrt(aspect)))
    height = max(48, round(side / math.sqrt(aspect)))
    return width, height


def draw_picture(
    rng: np.random.Generator, three: float = 0.0, largest_px: float = math.inf
) -> tuple[Scene, Pixels]:
    """Draw a scene and paint it at a random size; with chance `three` it holds three things.

    A size whose sides' geometric mean is above `largest_px` is scaled down to it.
    """
    width, height = draw_size(rng)
    scale = min(1.0, largest_px / math.sqrt(width * height))
    width, height = max(48, round(width * scale)), max(48, round(height * scale))
    count = 3 if three and rng.random() < three else None
    # Under 140 px a third shape is a few pixels wide.
    if min(width, height) < 120:
        count = int(rng.integers(1, 3))
    scene = draw_scene(rng, width / height, count)
    return scene, render(scene, width, height)
