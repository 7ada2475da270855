"""A small JPEG of a file, for the report. Runs in the contained child, as all decoding does."""

from __future__ import annotations

import io

from PIL import Image

from operators.decode_image import decode_image
from operators.settings import ImageSettings

SIDE_PX = 160


def thumbnail(data: bytes, settings: ImageSettings) -> bytes:
    """At most 160x160 px, sides in proportion. Raises MediaError as decode_image does."""
    image = Image.fromarray(decode_image(data, settings).pixels)
    image.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
