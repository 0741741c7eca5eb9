"""Decoders give values, refuse code, and stop at damage and at bombs."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.shards.decode import Limits, decode_field, decode_image


def picture(
    mode: str, file_format: str, size: tuple[int, int] = (5, 4), color: Any = None, **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color or 0).save(out, file_format, **options)
    return out.getvalue()


def saved(function: Callable[..., Any], *values: Any, **named: Any) -> bytes:
    out = io.BytesIO()
    function(out, *values, **named)
    return out.getvalue()


def test_text_numbers_json() -> None:
    assert decode_field("txt", "déjà\n".encode()) == "déjà\n"
    assert decode_field("cls", b" 17\n") == 17
    assert decode_field("meta.json", b'{"a": [1, 2]}') == {"a": [1, 2]}
    assert decode_field("JSON.GZ", gzip.compress(b"[3]", mtime=0)) == [3]


def test_arrays() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.testing.assert_array_equal(decode_field("npy", saved(np.save, array)), array)
    np.testing.assert_array_equal(decode_field("x.npy.gz", gzip.compress(saved(np.save, array))), array)
    both = decode_field("npz", saved(np.savez_compressed, a=array, b=array.T))
    assert both.keys() == {"a", "b"}
    np.testing.assert_array_equal(both["b"], array.T)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77] * 3),
        ("1", 1, [255] * 3),
        ("RGBA", (10, 20, 30, 0), [255] * 3),  # transparent: white shows
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("LA", (77, 255), [77] * 3),
        ("I;16", 51200, [200] * 3),
        ("P", 0, [0] * 3),
    ],
)
def test_png_modes(mode: str, color: Any, expected: list[int]) -> None:
    image = decode_field("png", picture(mode, "PNG", color=color))
    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8
    assert image[2, 2].tolist() == expected


def test_palette_with_transparent_entry() -> None:
    out = io.BytesIO()
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([255, 0, 0, 0, 0, 255])
    paletted.putdata([0, 1])
    paletted.save(out, "PNG", transparency=0)
    assert decode_image(out.getvalue())[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize(
    ("mode", "color"), [("RGB", (200, 100, 50)), ("CMYK", (55, 155, 205, 0)), ("L", 120)]
)
def test_jpeg_modes(mode: str, color: Any) -> None:
    expected = [120] * 3 if mode == "L" else [200, 100, 50]
    image = decode_field("jpeg", picture(mode, "JPEG", (16, 16), color, quality=95)).astype(int)
    assert np.abs(image - expected).max() <= 6


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize(("tag", "turned"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_photographs_are_turned_upright(file_format: str, tag: int, turned: int) -> None:
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = tag
    Image.fromarray(stored).save(out, file_format, exif=exif, lossless=True)
    assert np.array_equal(decode_image(out.getvalue()), np.rot90(stored, turned))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_orientation_tag_is_no_reason_to_lose_the_picture() -> None:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(out, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(out.getvalue()).shape == (2, 3, 3)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animated_pictures_are_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (3, 3), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, file_format, save_all=True, append_images=frames[1:], duration=40)
    with pytest.raises(DataError, match="animated, 2 frames"):
        decode_image(out.getvalue())


def test_a_phones_double_jpeg_gives_its_photograph() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(decode_field("jpg", out.getvalue())[0, 0].astype(int) - [255, 0, 0]).max() < 6


def test_webp() -> None:
    data = picture("RGB", "WEBP", color=(10, 20, 30), lossless=True)
    assert decode_field("webp", data)[0, 0].tolist() == [10, 20, 30]


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = picture("RGB", "JPEG", (16, 16), progressive=True)
    start = data.index(b"\xff\xda")
    with pytest.raises(DataError, match="a JPEG of 600 scans"):
        decode_field("jpg", data[:start] + data[start : start + 14] * 600 + b"\xff\xd9")


def test_deep_json_is_damage() -> None:
    with pytest.raises(DataError, match="damaged"):
        decode_field("json", b"[" * 100_000)


def test_truncated_pictures() -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8))
    for file_format in ("JPEG", "PNG"):
        data = saved(noise.save, file_format)
        for cut in (len(data) // 2, 20, 0):
            with pytest.raises(DataError, match="damaged"):
                decode_field("jpg", data[:cut])


def test_other_picture_formats_are_not_opened() -> None:
    with pytest.raises(DataError, match="damaged"):
        decode_field("png", picture("RGB", "BMP"))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 100_000])
def test_pixel_bombs(side: int) -> None:
    with pytest.raises(DataError, match="pixels"):
        decode_field("png", png_header(side, side))


def test_compression_bombs() -> None:
    small = Limits(bytes=1000)
    with pytest.raises(DataError, match="more than 1000"):
        decode_field("txt.gz", gzip.compress(b"0" * 100_000, mtime=0), small)
    with pytest.raises(DataError, match="allowed are 1000"):
        decode_field("npz", saved(np.savez_compressed, a=np.zeros(10_000)), small)


def test_array_that_claims_too_much() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(DataError, match="damaged"):
        decode_field("npy", header.getvalue())


@pytest.mark.parametrize("name", ["pkl", "pickle", "pyd", "pth", "pt", "state.pt", "pkl.gz"])
def test_code_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"refused.*can run code"):
        decode_field(name, pickle.dumps([1]) if not name.endswith("gz") else gzip.compress(b"x", mtime=0))


def test_pickled_arrays_are_refused() -> None:
    for name, save in (("npy", np.save), ("npz", np.savez)):
        with pytest.raises(DataError, match="damaged"):
            decode_field(name, saved(save, np.array([{}], object), allow_pickle=True))
    with pytest.raises(DataError, match="damaged"):
        decode_field("npy", pickle.dumps(np.arange(3)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("txt", b"\xff\xfe\x00"),
        ("json", b"{"),
        ("cls", b"cat"),
        ("npy", b"\x93NUMPY"),
        ("npz", b"PK\x03\x04"),
        ("txt.gz", b"plain"),
        ("txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-12]),
        ("npz", b""),
    ],
)
def test_damage(name: str, data: bytes) -> None:
    with pytest.raises(DataError, match="damaged"):
        decode_field(name, data)


def test_what_is_no_picture_says_how_it_begins() -> None:
    with pytest.raises(DataError, match=r"no JPEG, PNG or WebP, it begins with b'<html>'") as error:
        decode_field("jpg", b"<html>")
    assert "0x" not in str(error.value)


def test_zip_with_a_broken_member() -> None:
    data = bytearray(saved(np.savez, a=np.arange(100)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["a.npy"]
    data[200] ^= 0xFF
    with pytest.raises(DataError, match="damaged"):
        decode_field("npz", bytes(data))


def test_unknown_field() -> None:
    with pytest.raises(DataError, match=r"no decoder.*jpeg"):
        decode_field("exe", b"")
    assert json.loads(json.dumps(decode_field("json", b"null"))) is None
