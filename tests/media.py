"""Test pictures, good and bad, all made here."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]: smooth areas, edges and grain, as a camera gives them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 64), max(2, width // 64), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    y, x = np.ogrid[:height, :width]
    edge = np.where((x // 37 + y // 53) % 5 == 0, 60, 0)[:, :, None]
    return np.clip(smooth.astype(np.int16) + grain + edge, 0, 255).astype(np.uint8)


def encode(image: Image.Image | npt.NDArray[Any], format: str, **options: object) -> bytes:
    """The bytes of a file."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    file = io.BytesIO()
    if format == "HEIF":
        # not as Pillow's plugin: that would read HEIF as well, in place of the product's
        exif = options.pop("exif", Image.Exif()).tobytes()
        pillow_heif.from_pillow(image).save(file, exif=exif, **options)
    else:
        image.save(file, format, **options)
    return file.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def animated(format: str) -> bytes:
    """Two frames, 60x40: red, then blue."""
    red, blue = (Image.new("RGB", (60, 40), name) for name in ("red", "blue"))
    return encode(red, format, save_all=True, append_images=[blue], duration=100)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks (name, body), each with its right checksum."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(name, body) of each chunk, the pixels as one."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks[name] = chunks.get(name, b"") + data[at + 8 : at + 8 + length]
        at += 12 + length
    return list(chunks.items())


def png_bomb(side: int = 60_000) -> bytes:
    """A few KB that claim side x side pixels, and hold their first megabytes, really deflated."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(4 << 20), 9)), (b"IEND", b""))


def grey_tiff(width: int, height: int, bits: int, photometric: int, samples: bytes) -> bytes:
    """One uncompressed strip. photometric: 0 where zero is white, 1 where it is black."""
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1}
    fields |= {278: height, 279: len(samples)}
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + samples


def every_format() -> dict[str, bytes]:
    """One ordinary 160x120 file of each format that the decoder knows."""
    picture = photo(160, 120)
    grey = Image.fromarray(picture).convert("P")
    return {
        "JPEG": encode(picture, "JPEG", quality=90),
        "JPEG progressive": encode(picture, "JPEG", quality=90, progressive=True),
        "PNG": encode(picture, "PNG"),
        "WebP": encode(picture, "WEBP"),
        "WebP lossless": encode(picture, "WEBP", lossless=True),
        "GIF": encode(grey, "GIF"),
        "BMP": encode(picture, "BMP"),
        "TIFF": encode(picture, "TIFF"),
        "TIFF deflate": encode(picture, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF LZW": encode(picture, "TIFF", compression="tiff_lzw"),
        "AVIF": encode(picture, "AVIF"),
        "HEIC": encode(picture, "HEIF"),
    }
