"""Bytes to pixels: any still picture to uint8 RGB, upright, opaque.

Runs in the contained child (operators/contain.py): the decoders are C libraries fed with strangers'
files. The header is read first; nothing is allocated for pixels before the limit has been checked.

    grey, 1 bit         R = G = B
    palette, alpha      laid over image.background; a picture without transparency is not touched
    CMYK, YCCK          Pillow's plain conversion, Adobe's inverted JPEGs included; no ICC profiles
    12 and 16 bit       the high 8, which is what Pillow itself keeps of 16-bit colour
    32 bit, float       see `_grey_of_range`
    several pictures    the first frame or page
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pi_heif import HeifImageFile
from pi_heif import options as heif_options
from PIL import (
    AvifImagePlugin,
    Image,
    ImageColor,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from PIL.ExifTags import Base

from operators.errors import MediaError
from operators.patchify import target_size
from operators.settings import ImageSettings

# First bytes of a file to the only Pillow plugin that may open it.
SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

# Of HEIC, the form of phones' pictures, and of other HEIF. `mif1` and `msf1` only say that it is HEIF, and
# AVIF is that too.
HEIF_BRANDS = re.compile(b"he[iv][cmsx]|heif|mif1|msf1")
Image.register_open("HEIF", HeifImageFile)  # without its own look at the first bytes
# Ray gives a task one CPU. Thumbnails, depth maps and mattes are not the picture.
heif_options.DECODE_THREADS = 1
heif_options.THUMBNAILS = heif_options.DEPTH_IMAGES = heif_options.AUX_IMAGES = False

# What Pillow's parsers raise on damaged files, caught only around calls into Pillow, so
# that none of these can hide a mistake of ours.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# EXIF 2.32, tag 274: what turns the stored picture upright. 5 to 8 swap the sides.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)

# Pixels that are copied from Pillow to numpy at a time: 12 MP take 9 ms in bands that fit the
# cache, 20 at once.
BAND_PIXELS = 1 << 18


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 [h, w, 3], RGB, writable. width_px, height_px: the whole picture, upright;
    h and w are less only after a scaled decode."""

    pixels: npt.NDArray[np.uint8]
    width_px: int
    height_px: int


def decode_image(data: bytes, settings: ImageSettings) -> Picture:
    """The picture in `data`.

    Raises MediaError decode.empty, .unsupported, .corrupt, .too_large or .out_of_memory, and with
    scaled_decode prepare.aspect_ratio.
    """
    try:
        with _quiet(), _open(data, settings.max_pixels) as image:
            stored = image.size  # a scaled decode makes it less
            if settings.scaled_decode and image.format in ("JPEG", "MPO"):
                _draft(image, settings.max_soft_tokens)
            if image.format == "PNG":
                _check_png(data)
            with _damage(image.format):
                image.load()
            # Only now: the orientation of a PNG may stand behind its pixels.
            width, height = _upright_size(image, stored)
            pixels = _rgb(_upright(image), settings.background)
    except MemoryError as error:
        raise MediaError(
            "decode.out_of_memory", "decoding needs more than image.max_memory_bytes"
        ) from error
    return Picture(pixels, width, height)


def probe_image(data: bytes, settings: ImageSettings) -> tuple[int, int]:
    """(width, height) of the upright picture from its header; no pixel is decoded.

    Raises MediaError decode.empty, .unsupported, .corrupt, .too_large.
    """
    with _quiet(), _open(data, settings.max_pixels) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            _read_behind_pixels(image)
        return _upright_size(image, image.size)


@contextmanager
def _damage(what: str | None) -> Iterator[None]:
    """What Pillow raises inside is the file's fault."""
    try:
        yield
    except DAMAGE as error:
        raise MediaError("decode.corrupt", f"{what}: {_said(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of damaged metadata; a corpus of millions would fill the log with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise MediaError("decode.empty", "the file has no bytes")
    format = _sniff(data)
    if format is None:
        raise MediaError("decode.unsupported", f"no picture format begins with {bytes(data[:8])!r}")
    # image.max_pixels is the guard, with a code and a message; Pillow's own only warns below 2x.
    Image.MAX_IMAGE_PIXELS = None
    # Ray gives a task one CPU; the plugin would start a thread for each core of the node.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    # 64 MiB for one text or colour profile of a PNG, as for all texts together: Pillow's 1 MiB
    # refuses diagrams that carry their own source.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        image = Image.open(io.BytesIO(data), formats=[format])
    except UnidentifiedImageError as error:
        raise MediaError("decode.corrupt", f"{format}: the header is damaged") from error
    except DAMAGE as error:
        raise MediaError("decode.corrupt", f"{format}: {_said(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise MediaError(
            "decode.too_large",
            f"{width}x{height} is {width * height} pixels; image.max_pixels is {max_pixels}",
        )
    return image


def _sniff(data: bytes) -> str | None:
    for signature, format in SIGNATURES:
        if data.startswith(signature):
            return format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        # ISO base media: HEIF and MP4 begin alike, the brands tell
        brands = data[8 : max(16, min(int.from_bytes(data[:4], "big"), 256))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(HEIF_BRANDS.fullmatch(brands, at, at + 4) for at in range(0, len(brands), 4)):
            return "HEIF"
    return None


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFF upright by itself, and reports its upright size from the start.
    if image.format == "TIFF":
        return 1
    try:
        # The method of PNG would load the picture, and leave out that its pixels are damaged.
        orientation = Image.Image.getexif(image).get(Base.Orientation, 1)
    except DAMAGE:
        # damaged metadata: viewers show the picture all the same
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upright_size(image: Image.Image, stored: tuple[int, int]) -> tuple[int, int]:
    width, height = stored
    return (height, width) if _orientation(image) in SWAPS_SIDES else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    method = UPRIGHT.get(_orientation(image))
    if method is None:
        return image
    with _damage(image.format):
        return image.transpose(method)


def _draft(image: Image.Image, max_soft_tokens: int) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8: the smallest that is not below the grid's size."""
    width, height = _upright_size(image, image.size)
    height, width = target_size(height, width, max_soft_tokens)
    if _orientation(image) in SWAPS_SIDES:
        height, width = width, height
    image.draft(None, (width, height))


def _read_behind_pixels(image: PngImagePlugin.PngImageFile) -> None:
    """A PNG's metadata from the first pixels on, which Pillow reads only when it has decoded them."""
    stream = image.png
    assert stream  # noqa: S101
    assert stream.fp  # noqa: S101
    # A head of a file ends early, and what is damaged says nothing.
    with suppress(*DAMAGE):
        stream.fp.seek(image.tile[0].offset - 8)
        while True:
            name, at, length = stream.read()
            if name in (b"IEND", b"fcTL"):  # where Pillow, too, is done with the first picture
                break
            if name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                stream.call(name, at, length)
            stream.fp.seek(at + length + 4)


def _check_png(data: bytes) -> None:
    """Pillow skips the checksum of pixel data and shows noise from there on. 1 GB/s and more."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        # critical chunks have a capital; one that ends past the file is Pillow's to report
        if name[:1].isupper() and end + 4 <= len(data):
            (crc,) = struct.unpack_from(">I", data, end)
            if zlib.crc32(view[at + 4 : end]) != crc:
                raise MediaError("decode.corrupt", f"PNG: wrong checksum in {name!r} at byte {at}")
        if name == b"IEND":
            return  # what follows is not the picture's
        at = end + 4


def _said(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__


def _rgb(image: Image.Image, background: str) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey(image, background)
    if image.mode == "P" and image.palette is None:
        raise MediaError("decode.corrupt", "PNG: colours by number, and no palette")
    with _damage(image.mode):
        if image.mode == "La":
            image = image.convert("LA")  # the only way from there
        if image.has_transparency_data:
            image = _opaque(_convert(image, "RGBA"), background)
        image = _convert(image, "RGB")
    return _array(image)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _opaque(image: Image.Image, background: str) -> Image.Image:
    if image.getchannel("A").getextrema() == (255, 255):
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _deep_grey(image: Image.Image, background: str) -> npt.NDArray[np.uint8]:
    """Grey of more than 8 bits a sample, which Pillow would cut off at 255."""
    with _damage(image.mode):
        values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode.startswith("I;16"):
        bits = int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
        grey = (values >> (bits - 8)).astype(np.uint8)
    else:
        grey = _grey_of_range(values)
    # WhiteIsZero: up to 8 bits Pillow inverts by itself.
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        grey = ~grey
    pixels = np.repeat(grey[:, :, None], 3, axis=2)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # and not a PNG's text of that name
        pixels[values == transparent] = ImageColor.getrgb(background)
    return pixels


def _grey_of_range(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """8-bit grey of int32 or float32 samples, whose file does not say which value is white.

    White is the least of 1 (floats only), 255 and 65535 that no sample exceeds. With a negative or
    larger sample (depth maps, scans), the picture's own range is stretched. NaN is black.
    """
    samples = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    finite = samples[np.isfinite(samples)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        white = high
    else:
        low = 0.0
    scaled = (np.clip(samples, low, white) - low) / max(white - low, 1e-300)
    grey: npt.NDArray[np.uint8] = np.rint(scaled * 255).astype(np.uint8)
    return grey


def _array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A writable copy. In bands: Pillow's export makes two passes over memory of its own."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, BAND_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        with _damage(image.mode):
            band = np.asarray(image.crop((0, top, width, bottom)))
        pixels[top:bottom] = band
    return pixels
