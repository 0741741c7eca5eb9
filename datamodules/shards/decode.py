"""From a stored field to a value, by its extension; only formats that cannot run code.

A field is what follows the first dot of a file's name (`jpg`, `seg.png`, `tokens.npy`, `json.gz`); its last
part, or the one before `.gz`, chooses the decoder.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.errors import DataError


@dataclass(frozen=True)
class Limits:
    """How large a decoded field may become; what is beyond is an attack or a mistake.

    Attributes:
        pixels: of an image.
        bytes: of an unpacked `.gz` or `.npz`.
        scans: of a progressive JPEG; each one goes over all pixels again, so a small file could take hours.
    """

    pixels: int = 64 << 20
    bytes: int = 256 << 20
    scans: int = 100


def decode_field(name: str, data: bytes, limits: Limits | None = None) -> Any:
    """Decode one field.

    Args:
        name: field name, such as `jpg`.
        data: its contents.
        limits: size limits; `None`: the default ones.

    Returns:
        `jpg`, `jpeg`, `png`, `webp`: uint8 [H,W,3] array (see `decode_image`); `txt`: str; `json`: what it holds;
        `cls`: int; `npy`: array; `npz`: dict of arrays. `.gz` of these: the same.

    Raises:
        DataError: the format is refused or unknown, the contents are damaged or too large.
    """
    limits = limits or Limits()
    parts = name.lower().split(".")
    if parts[-1] == "gz" and len(parts) > 1:
        data, parts = unpack(name, data, limits), parts[:-1]
    extension = parts[-1]
    if extension in _REFUSED:
        raise DataError(
            f"field {name!r} is refused: {_REFUSED[extension]} can run code when read; store npy, npz or json"
        )
    if (decoder := _DECODERS.get(extension)) is None:
        raise DataError(
            f"field {name!r} has no decoder, known are {', '.join(sorted(_DECODERS))} and .gz of these"
        )
    try:
        return decoder(data, limits)
    except DataError as error:
        raise DataError(f"field {name!r}: {error}") from None
    except (
        ValueError,
        OSError,
        EOFError,
        SyntaxError,
        MemoryError,
        RecursionError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(
            f"field {name!r} is damaged ({type(error).__name__}: {error}); {len(data)} bytes"
        ) from error


def decode_image(data: bytes, limits: Limits | None = None) -> npt.NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP to 8-bit RGB.

    Grey, palette and CMYK pictures are converted; 16 bits are scaled to 8; transparency is laid on white; a
    photograph is turned upright, as its EXIF tag says. A truncated file is an error, and so is an animated one: which
    frame is meant, nobody said.

    Args:
        data: the file's contents.
        limits: size limits; pixels are counted before anything is unpacked.

    Returns:
        uint8 [H,W,3].

    Raises:
        DataError: too many pixels or scans, or animated.
        OSError: not such a picture, or truncated.
    """
    limits = limits or Limits()
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise DataError(str(error)) from None
    except UnidentifiedImageError:  # Pillow's own message names an object in memory
        raise UnidentifiedImageError(f"no JPEG, PNG or WebP, it begins with {data[:16]!r}") from None
    with picture:
        if (pixels := picture.width * picture.height) > limits.pixels:
            raise DataError(
                f"{picture.width} x {picture.height} = {pixels} pixels, allowed are {limits.pixels}"
            )
        # MPO is a JPEG with further pictures behind it, as phones write them; the first is the photograph.
        if picture.format != "MPO" and (frames := getattr(picture, "n_frames", 1)) > 1:
            raise DataError(
                f"animated, {frames} frames; expected one picture, or a clip in a VideoDataModule"
            )
        if picture.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > limits.scans:
            raise DataError(f"a JPEG of {scans} scans, allowed are {limits.scans}")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return np.asarray(_to_rgb(picture))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "I;16", "I;16B"):  # 16-bit grey; Pillow's own conversion clips it at 255
        grey = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def unpack(name: str, data: bytes, limits: Limits | None = None) -> bytes:
    """Unpack a `.gz` field.

    Raises:
        DataError: it is damaged, or unpacks to more than the limit.
    """
    limits = limits or Limits()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            out = packed.read(limits.bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"field {name!r} is damaged ({error}); {len(data)} bytes") from error
    if len(out) > limits.bytes:
        raise DataError(f"field {name!r} unpacks to more than {limits.bytes} bytes")
    return out


def _npy(data: bytes, limits: Limits) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _npz(data: bytes, limits: Limits) -> dict[str, npt.NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > limits.bytes:
            raise DataError(f"unpacks to {size} bytes, allowed are {limits.bytes}")
        return {m.removesuffix(".npy"): _npy(archive.read(m), limits) for m in archive.namelist()}


_DECODERS: dict[str, Callable[[bytes, Limits], Any]] = {
    "jpg": decode_image,
    "jpeg": decode_image,
    "png": decode_image,
    "webp": decode_image,
    "txt": lambda data, _: data.decode("utf-8"),
    "json": lambda data, _: json.loads(data),
    "cls": lambda data, _: int(data),
    "npy": _npy,
    "npz": _npz,
}

_REFUSED = {
    **dict.fromkeys(("pkl", "pickle", "pyd", "dill", "joblib"), "a pickle"),
    **dict.fromkeys(("pth", "pt", "ckpt", "bin"), "a PyTorch file"),
}
