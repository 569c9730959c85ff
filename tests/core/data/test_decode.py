import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.decode import CorruptImage, decode, to_tensor
from core.data.source import DataError
from tests.core.data.images import encode, pixels

RGB = pixels(0)


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_out_as_they_were(kind: str):
    image = decode(encode(RGB, kind))
    assert image.dtype == torch.uint8
    assert torch.equal(image, chw(RGB))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"quality": 60, "progressive": True}, {"subsampling": 0}])
def test_jpegs_have_the_pixels_that_pillow_gives(mode: str, options: dict):
    data = encode(Image.fromarray(RGB).convert(mode), **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(decode(data), chw(want))


def test_grey_becomes_three_equal_channels():
    grey = RGB[..., 0]
    image = decode(encode(grey, "PNG"))
    assert image.shape == (3, 24, 32)
    assert all(torch.equal(channel, torch.from_numpy(grey.copy())) for channel in image)


def test_palette_is_looked_up():
    picture = Image.fromarray(RGB).quantize(16)
    assert torch.equal(decode(encode(picture, "PNG")), chw(np.asarray(picture.convert("RGB"))))


def test_palette_with_transparency_is_read():
    picture = Image.fromarray(RGB).quantize(16)
    data = encode(picture, "PNG", transparency=b"\x00\xff" * 8)
    assert torch.equal(decode(data), chw(np.asarray(picture.convert("RGB"))))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(mode: str):
    picture = Image.fromarray(RGB).convert(mode)
    picture.putalpha(128)
    want = Image.fromarray(RGB).convert(mode[:-1]).convert("RGB")
    assert torch.equal(decode(encode(picture, "PNG")), chw(np.asarray(want)))


def test_sixteen_bits_keep_the_upper_eight():
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert decode(encode(deep, "PNG"))[0].tolist() == [[0, 0, 1, 128, 255]]


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def netpbm(white: int) -> bytes:
    return b"P5\n64 8\n%d\n" % white + (RAMP * white).astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encode((RAMP * 65535).astype(np.uint16), "PNG"),
        encode((RAMP * 65535).astype(np.uint16), "TIFF"),
        encode(RAMP.astype(np.float32), "TIFF"),
        netpbm(1023),
        netpbm(4095),
    ],
)
def test_a_ramp_of_a_stated_range_goes_from_black_to_white(data: bytes):
    assert np.abs(decode(data)[0].numpy() - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode((RAMP * 4095).astype(np.uint16), "PNG"), "whole numbers of 16 bits from 0 to 4095: its range is not"),
        (encode((RAMP * 4095).astype(np.uint16), "TIFF"), "whole numbers of 16 bits from 0 to 4095"),
        (encode((RAMP * 255).astype(np.uint16), "PNG"), "whole numbers of 16 bits from 0 to 255"),
        (encode((RAMP * 255).astype(np.int32), "TIFF"), "whole numbers of 31 bits from 0 to 255"),
        (encode((RAMP * -9).astype(np.int32), "TIFF"), "whole numbers of 31 bits from -9 to 0"),
        (encode((RAMP * 255).astype(np.float32), "TIFF"), "floats from 0 to 255: .*convert it to 8 bits"),
        (encode((RAMP * 2000 - 1000).astype(np.float32), "TIFF"), "floats from -1000 to 1000"),
        (encode(np.full((8, 8), np.nan, np.float32), "TIFF"), "floats from nan to nan"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused_with_what_they_are(data: bytes, why: str):
    with pytest.raises(CorruptImage, match=why):
        decode(data)


def test_colours_that_use_few_of_their_sixteen_bits_are_refused():
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def deep(white: int) -> bytes:
        row = b"\0" + np.repeat((RAMP[0] * white).astype(">u2"), 3).tobytes()
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 8, 16, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")

    assert decode(deep(65535)).max() == 255
    with pytest.raises(CorruptImage, match="16 bits a channel of which the upper 4 are not used"):
        decode(deep(4095))


def test_black_of_any_depth_is_an_image():
    for image in (np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.int32), np.zeros((8, 8), np.float32)):
        assert not decode(encode(image, "TIFF")).any()


def test_avif_is_read():
    assert np.abs(decode(encode(RGB, "AVIF", quality=95)).permute(1, 2, 0).numpy().astype(int) - RGB).mean() < 8


def test_bilevel_is_black_and_white():
    picture = Image.fromarray(RGB).convert("1")
    assert set(decode(encode(picture, "PNG")).unique().tolist()) == {0, 255}


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encode(RGB, exif=exif)).shape == (3, 24, 32)


JPEG = encode(RGB)
PNG = encode(RGB, "PNG")
BROKEN = {
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "JPEG header": JPEG[:20],
    "half a PNG": PNG[: len(PNG) // 2],
    "PNG with a damaged row": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
    "zeros": bytes(1000),
    "a format beyond the plain ones": encode(RGB, "PCX"),  # as PostScript, for which Pillow starts a program
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_corrupt(name: str):
    with pytest.raises(CorruptImage) as caught:
        decode(BROKEN[name])
    assert isinstance(caught.value, DataError)
    assert str(caught.value)
    assert " at 0x" not in str(caught.value)  # the same words in every process


def test_a_decompression_bomb_is_refused_by_its_header():
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(CorruptImage, match="12000 x 12000 pixels are more than"):
        decode(bomb)


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_the_work():
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode(data, least=1).shape == (3, 375, 375)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(CorruptImage, match="30[0-9] scans of 3000 x 3000 pixels are more than"):
        decode(data[:-2] + scan * 297 + data[-2:])


def test_pixels_in_memory_are_rearranged():
    assert torch.equal(to_tensor(RGB), chw(RGB))
    assert torch.equal(to_tensor(RGB[..., 1]), chw(RGB)[1].expand(3, -1, -1))


@pytest.mark.parametrize("image", [RGB.astype(np.float32), RGB[None], RGB[..., :2]])
def test_other_arrays_are_refused(image: np.ndarray):
    with pytest.raises(CorruptImage, match="are not uint8"):
        to_tensor(image)


@pytest.mark.parametrize("name", ["plain", "grey", "progressive", "odd", "cmyk", "extra bytes"])
def test_pixels_are_the_same_without_simplejpeg(monkeypatch: pytest.MonkeyPatch, name: str):
    data = {
        "plain": encode(pixels(1, 90, 121), quality=92),
        "grey": encode(pixels(1)[..., 0]),
        "progressive": encode(pixels(1, 90, 121), progressive=True),
        "odd": encode(pixels(2, 31, 33), subsampling=0),
        "cmyk": encode(Image.fromarray(RGB).convert("CMYK")),
        "extra bytes": encode(RGB)[:-2] + b"trailing" + encode(RGB)[-2:],
    }[name]
    found = [decode(data, least) for least in (0, 500, 100)]
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert all(torch.equal(a, decode(data, least)) for a, least in zip(found, (0, 500, 100), strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_comes_smaller_but_with_enough_pixels(kind: str):
    picture = pixels(0, 101, 150)
    data = encode(picture, kind)
    assert decode(data).shape == (3, 101, 150)
    assert decode(data, 101 * 150 // 3).shape == (3, 101, 150)
    half = decode(data, 101 * 150 // 5)
    assert half.shape == (3, 51, 75)
    want = np.asarray(Image.fromarray(picture).resize((75, 51), Image.Resampling.BOX)).astype(float)
    assert np.abs(half.permute(1, 2, 0).numpy() - want).mean() < 3
    assert decode(data, 1).shape == (3, 13, 19)


def test_pixels_in_memory_come_smaller_too():
    assert to_tensor(pixels(0, 40, 60), 600).shape == (3, 20, 30)
