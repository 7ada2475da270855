"""Every kind of file gives the picture a viewer shows, or a coded failure."""

from __future__ import annotations

import io
import random
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from media import (
    animated,
    encode,
    every_format,
    grey_tiff,
    photo,
    png,
    png_bomb,
    png_chunks,
    with_orientation,
)
from PIL import Image, ImageOps
from transformers import Gemma4UnifiedImageProcessor

from operators.decode_image import decode_image, probe_image
from operators.errors import MediaError
from operators.patchify import patchify
from operators.settings import ImageSettings

DEFAULT = ImageSettings()
LOSSY = {"JPEG", "JPEG progressive", "WebP", "AVIF", "HEIC", "GIF"}


def code(data: bytes, settings: ImageSettings = DEFAULT) -> str:
    with pytest.raises(MediaError) as failure:
        decode_image(data, settings)
    return failure.value.code


def pixels(data: bytes, settings: ImageSettings = DEFAULT) -> np.ndarray:
    return decode_image(data, settings).pixels


@pytest.mark.parametrize("name", every_format())
def test_format(name: str) -> None:
    data = every_format()[name]
    picture = decode_image(data, DEFAULT)
    assert (picture.width_px, picture.height_px) == (160, 120) == probe_image(data, DEFAULT)
    assert picture.pixels.shape == (120, 160, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.flags.c_contiguous
    assert picture.pixels.flags.writeable
    difference = np.abs(picture.pixels.astype(int) - photo(160, 120)).mean()
    assert difference == 0 if name not in LOSSY else difference < 20


@pytest.mark.parametrize("name", every_format())
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.95])
def test_truncated(name: str, part: float) -> None:
    data = every_format()[name]
    assert code(data[: int(len(data) * part)]) == "decode.corrupt"


@pytest.mark.parametrize("name", every_format())
def test_any_damage_is_a_picture_or_a_code(name: str) -> None:
    rng = random.Random(name)
    data = every_format()[name]
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[rng.randrange(rng.choice([100, len(data)]))] = rng.randrange(256)
        with suppress(MediaError):
            decode_image(bytes(damaged), ImageSettings(max_pixels=1_000_000))


def test_damaged_png_pixels_are_seen() -> None:
    data = bytearray(every_format()["PNG"])
    data[len(data) // 2] ^= 1
    assert code(bytes(data)) == "decode.corrupt"


def test_missing_png_pixels_are_seen() -> None:
    """473 to 556 of 600 rows were black, and the row ok, where one IDAT chunk was left out."""
    header, (_, body), end = png_chunks(encode(photo(160, 120), "PNG"))
    third = len(body) // 3
    parts = [(b"IDAT", body[at : at + third]) for at in range(0, len(body), third)]
    assert pixels(png(header, *parts, end)).shape == (120, 160, 3)
    assert code(png(header, parts[0], *parts[2:], end)) == "decode.corrupt"


def test_damaged_deflate_is_seen_behind_a_right_checksum() -> None:
    header, (_, body), end = png_chunks(encode(photo(160, 120), "PNG"))
    middle = len(body) // 2
    damaged = body[:middle] + bytes(100) + body[middle + 100 :]
    assert code(png(header, (b"IDAT", damaged), end)) == "decode.corrupt"


@pytest.mark.parametrize("more", [[], [(b"tRNS", b"\0\1")]])
def test_a_palette_png_without_its_palette(more: list[tuple[bytes, bytes]]) -> None:
    chunks = png_chunks(encode(Image.fromarray(photo(16, 16)).convert("P"), "PNG"))
    header, _, body, end = chunks
    assert [name for name, _ in chunks] == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    assert code(png(header, *more, body, end)) == "decode.corrupt"


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_png_may_carry_megabytes_of_metadata(name: bytes) -> None:
    picture = photo(40, 30)
    header, *rest = png_chunks(encode(picture, "PNG"))
    data = png(header, (name, b"mxfile\0\0" + zlib.compress(bytes(2 << 20))), *rest)
    np.testing.assert_array_equal(pixels(data), picture)


def test_what_follows_a_png_is_not_the_pictures() -> None:
    picture = photo(40, 30)
    data = encode(picture, "PNG") + b"\0\0\0\4ABCDxxxxyyyyzzzz"
    np.testing.assert_array_equal(pixels(data), picture)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "decode.empty"),
        (b"this is a text named .jpg\n", "decode.unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "decode.unsupported"),
        (b"8BPS\0\1" + bytes(100), "decode.unsupported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "decode.corrupt"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(50), "decode.unsupported"),
        (b"\xff\xd8\xff", "decode.corrupt"),
        (b"\x89PNG\r\n\x1a\n", "decode.corrupt"),
        (bytes(1000), "decode.unsupported"),
    ],
)
def test_not_a_picture(data: bytes, expected: str) -> None:
    assert code(data) == expected


def test_bomb_is_refused_from_its_header() -> None:
    data = png_bomb(60_000)
    assert len(data) < 10_000
    with pytest.raises(MediaError) as failure:
        decode_image(data, DEFAULT)
    assert failure.value.code == "decode.too_large"
    assert failure.value.message == (
        "60000x60000 is 3600000000 pixels; image.max_pixels is 300000000"
    )


def test_the_limit_is_inclusive_and_above_pillows_own() -> None:
    data = encode(Image.new("1", (13_400, 13_400)), "PNG")  # 179.56 MP, where Pillow raises
    assert probe_image(data, ImageSettings(max_pixels=13_400**2)) == (13_400, 13_400)
    assert code(data, ImageSettings(max_pixels=13_400**2 - 1)) == "decode.too_large"


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_first_frame(format: str) -> None:
    red = pixels(animated(format))
    assert red.shape == (40, 60, 3)
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format: str, orientation: int) -> None:
    image = Image.fromarray(photo(64, 48))
    data = encode(image, format, exif=with_orientation(orientation), quality=100)
    picture = decode_image(data, DEFAULT)
    shown = (48, 64) if orientation >= 5 else (64, 48)
    assert (picture.width_px, picture.height_px) == shown == probe_image(data, DEFAULT)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert picture.pixels.shape == expected.shape
    assert np.abs(picture.pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("name", [b"eXIf", b"iTXt"])
def test_orientation_behind_the_pixels_of_a_png(name: bytes) -> None:
    picture = photo(64, 48)
    header, body, end = png_chunks(encode(picture, "PNG"))
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    turned = name, with_orientation(6).tobytes()[6:] if name == b"eXIf" else xmp
    data = png(header, body, turned, end)
    assert probe_image(data, DEFAULT) == (48, 64)
    np.testing.assert_array_equal(pixels(data), np.rot90(picture, -1))
    # the header says all, so that pixels which cannot be decoded are not asked for
    unreadable = png(header, (b"IDAT", b"no pixels"), turned, end)
    assert probe_image(unreadable, DEFAULT) == (48, 64)
    assert code(unreadable) == "decode.corrupt"


@pytest.mark.parametrize("value", [0, 9, 700])
def test_senseless_orientation_is_ignored(value: int) -> None:
    data = encode(photo(64, 48), "JPEG", exif=with_orientation(value))
    assert pixels(data).shape == (48, 64, 3)


def test_damaged_exif_is_ignored() -> None:
    data = encode(photo(64, 48), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    assert pixels(data).shape == (48, 64, 3)


def test_alpha_lies_over_the_background() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = [255, 0, 0, 255]
    rgba[0, 1] = [255, 0, 0, 128]
    for format in ("PNG", "TIFF"):
        data = encode(rgba, format)
        white = pixels(data)
        assert white[0, 0].tolist() == [255, 0, 0]
        assert white[0, 1].tolist() == [255, 127, 127]
        assert white[1, 1].tolist() == [255, 255, 255]
        green = pixels(data, ImageSettings(background="#00ff00"))
        assert green[1, 1].tolist() == [0, 255, 0]


def test_grey_alpha() -> None:
    data = encode(Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA"), "PNG")
    assert pixels(data)[0].tolist() == [[10, 10, 10], [255, 255, 255]]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(format: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    data = encode(image, format, transparency=1)
    assert pixels(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(("mode", "transparent"), [("L", 7), ("RGB", (7, 7, 7))])
def test_transparent_colour(mode: str, transparent: object) -> None:
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    data = encode(image, "PNG", transparency=transparent)
    assert pixels(data)[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_opaque_alpha_changes_nothing() -> None:
    picture = photo(40, 30)
    opaque = np.dstack([picture, np.full((30, 40), 255, np.uint8)])
    np.testing.assert_array_equal(pixels(encode(opaque, "PNG")), picture)


def test_cmyk() -> None:
    # (0, 255, 255, 0) is red. In JPEG Pillow writes Adobe's inverted values, and reads them back.
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for format in ("JPEG", "TIFF"):
        assert pixels(encode(red, format))[8, 8].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_16_bit_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 257, 32_768, 65_535]], np.uint16)
    for format in ("PNG", "TIFF"):
        assert pixels(encode(values, format))[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_12_bit_keeps_the_high_8() -> None:
    # 0, 16, 2048 and 4095: two samples in three bytes
    data = grey_tiff(4, 1, 12, 1, bytes.fromhex("000010 800fff"))
    assert pixels(data)[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("bits", "samples"), [(1, "40"), (8, "00ff"), (16, "0000ffff")])
def test_zero_may_be_white(bits: int, samples: str) -> None:
    data = grey_tiff(2, 1, bits, 0, bytes.fromhex(samples))
    assert pixels(data)[0, :, 1].tolist() == [255, 0]


def test_transparent_value_of_16_bit_grey() -> None:
    values = np.array([[0x1234, 0x1235]], np.uint16)
    header, body, end = png_chunks(encode(values, "PNG"))
    data = png(header, (b"tRNS", b"\x12\x34"), body, end)
    assert pixels(data, ImageSettings(background="#00ff00"))[0].tolist() == [[0, 255, 0], [18] * 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.float32([[0.0, 51.0, 255.0]]), [0, 51, 255]),
        (np.float32([[0.0, 32767.5, 65535.0]]), [0, 128, 255]),
        (np.float32([[-1.0, 0.0, 1.0]]), [0, 128, 255]),
        (np.float32([[np.nan, np.inf, 1.0]]), [0, 255, 255]),
        (np.float32([[5e6, 5e6, 5e6]]), [0, 0, 0]),
        (np.int32([[0, 1, 255]]), [0, 1, 255]),
        (np.int32([[0, 257, 65_535]]), [0, 1, 255]),
        (np.int32([[-100, 0, 100]]), [0, 128, 255]),
    ],
)
def test_samples_without_a_declared_white(values: np.ndarray, expected: list[int]) -> None:
    assert pixels(encode(values, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_one_bit_and_grey(format: str) -> None:
    one = Image.new("1", (2, 1))
    one.putpixel((1, 0), 1)
    assert pixels(encode(one, format))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    grey = np.array([[3, 200]], np.uint8)
    assert pixels(encode(grey, format))[0].tolist() == [[3, 3, 3], [200, 200, 200]]


def test_lab() -> None:
    red = Image.new("LAB", (8, 8), (138, 208, 195))  # L* 54, a* 80, b* 67
    assert pixels(encode(red, "TIFF"))[4, 4].tolist() == pytest.approx([254, 8, 9], abs=5)


def test_several_pictures_in_a_jpeg() -> None:
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (16, 16), "blue")
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert pixels(data)[5, 5].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decode(orientation: int) -> None:
    data = encode(photo(2999, 2001), "JPEG", exif=with_orientation(orientation))
    settings = ImageSettings(max_soft_tokens=70, scaled_decode=True)
    full = decode_image(data, ImageSettings(max_soft_tokens=70))
    scaled = decode_image(data, settings)
    assert (scaled.width_px, scaled.height_px) == (full.width_px, full.height_px)
    # 480x336 are asked for; 1/4 is 750x501, 1/8 would be 375x251
    assert sorted(scaled.pixels.shape[:2]) == [501, 750]
    shown = (scaled.height_px, scaled.width_px)
    ours = patchify(scaled.pixels, 70, shown).values.astype(float)
    assert np.abs(ours - patchify(full.pixels, 70).values).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_file_to_patches_equals_transformers(mode: str, format: str, orientation: int) -> None:
    image = Image.fromarray(photo(500, 375)).convert(mode)
    data = encode(image, format, exif=with_orientation(orientation))
    with Image.open(io.BytesIO(data)) as opened:
        plain = ImageOps.exif_transpose(opened).convert("RGB")
    out = Gemma4UnifiedImageProcessor(max_soft_tokens=140)(plain, return_tensors="pt")
    ours = patchify(pixels(data), 140)
    scaled = torch.from_numpy(ours.values).to(torch.float32) * (1 / 255)
    assert torch.equal(out["pixel_values"][0, : len(scaled)], scaled)
