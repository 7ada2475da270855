"""What the contained child does with an image: decode, resize, patchify, hash.

Apart from media.py so that the child imports no store client and no Arrow.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from operators.decode_image import decode_image
from operators.patchify import patchify
from operators.settings import ImageSettings

# Imported once by the nursery; Pillow would otherwise look for its plugins in each new child.
PRELOAD = (
    "operators.prepare_image",
    "torch",
    *(
        f"PIL.{name}ImagePlugin"
        for name in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP")
    ),
)


class Prepared(NamedTuple):
    """media: uint8 [columns * rows, 6912]. width_px, height_px: the whole picture, upright."""

    media: npt.NDArray[np.uint8]
    columns: int
    rows: int
    media_hash: str
    width_px: int
    height_px: int
    decode_s: float
    prepare_s: float


def prepare_image(data: bytes, settings: ImageSettings) -> Prepared:
    """Raises MediaError decode.* and prepare.aspect_ratio."""
    started = time.perf_counter()
    picture = decode_image(data, settings)
    decoded = time.perf_counter()
    patches = patchify(
        picture.pixels, settings.max_soft_tokens, (picture.height_px, picture.width_px)
    )
    return Prepared(
        media=patches.values,
        columns=patches.columns,
        rows=patches.rows,
        media_hash=media_hash(patches.values.data, patches.columns, patches.rows),
        width_px=picture.width_px,
        height_px=picture.height_px,
        decode_s=decoded - started,
        prepare_s=time.perf_counter() - decoded,
    )


def media_hash(media: memoryview | bytes, columns: int, rows: int) -> str:
    """32 hex digits over grid and values: the engine's cache key for equal media."""
    return blake3(f"{columns}x{rows}:".encode()).update(media).hexdigest(length=16)
