"""Where a `PixelTransform` comes from: a backbone's own configuration, or numbers given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from datamodules.errors import DataError
from datamodules.processing.pixels import PixelTransform
from datamodules.processing.pretrained import read_model_json

# These crop too, but read a bare number as a square; the others that crop mean the shortest edge.
_SQUARE_TYPES = ("DeiT", "Beit")
BY_HAND = "give size, mean, std and channels by hand"


def pixel_transform(
    processor: str | None,
    size: int | tuple[int, int] | None,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    channels: int,
    download: bool,
) -> PixelTransform:
    """How pixels are prepared: as a backbone's configuration says, or by hand.

    Args:
        processor: folder or hub name of the backbone.
        size: edge of a square, or (height, width), in pixels; only without a processor, like the rest.
        mean: taken off the pixels in [0,1]; one number for all channels, or one each.
        std: what the pixels are then divided by.
        channels: 1 (grey) or 3 (RGB).
        download: fetch a processor by its name.

    Raises:
        DataError: neither or both of processor and size are given, or the processor cannot be read.
    """
    if (processor is None) == (size is None):
        found = "neither" if processor is None else "both"
        raise DataError(
            f"found {found} of processor and size; give processor=the backbone's folder or name, so that "
            f"pixels are those it was trained on, or {BY_HAND}"
        )
    if processor is not None:
        return from_pretrained(processor, download)
    edges = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(edges) != 2 or min(edges) < 1:
        raise DataError(f"size is {size!r}, expected one edge or (height, width), in pixels")
    return PixelTransform(channels, (edges[0], edges[1]), mean=_values(mean), std=_values(std))


def from_pretrained(name_or_path: str, download: bool = False) -> PixelTransform:
    """Read a model's `processor_config.json` or `preprocessor_config.json`.

    Args:
        name_or_path: folder or hub name of the backbone.
        download: fetch it by its name.

    Returns:
        The same arithmetic as the model's own image processor, in Pillow and torch.

    Raises:
        DataError: there is no such file, or it asks for something that would give uneven shapes.
    """
    nested = (read_model_json(name_or_path, "processor_config.json", download) or {}).get("image_processor")
    config = nested or read_model_json(name_or_path, "preprocessor_config.json", download)
    model = read_model_json(name_or_path, "config.json", download) or {}
    if config is None and "vocab_size" in model and "vision_config" not in model:
        raise DataError(
            f"{name_or_path!r} is a {model.get('model_type', '')} backbone for text, but this data holds pictures; "
            "expected the same modality; choose another backbone, or data of text"
        )
    if config is None:
        raise DataError(
            f"found no preprocessor_config.json in {name_or_path!r}, expected the one that the backbone was "
            f"saved with; give a backbone that has it (download=true fetches one by its name), or {BY_HAND}"
        )
    channels = int({**model, **model.get("vision_config", {})}.get("num_channels", 3))
    return PixelTransform(
        channels=channels,
        size=_read_size(config) if config.get("do_resize", True) else None,
        crop=_read_crop(config) if config.get("do_center_crop", False) else None,
        resample=int(config.get("resample", Image.Resampling.BILINEAR)),
        **_read_scale(config),
    )


def _read_size(config: dict[str, Any]) -> tuple[int, int] | int:
    size = config.get("size")
    if isinstance(size, int | float):
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        shortest = config.get("do_center_crop", False) and not kind.startswith(_SQUARE_TYPES)
        return int(size) if shortest else (int(size), int(size))
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and "shortest_edge" in size and "longest_edge" not in size:
        if not config.get("do_center_crop", False):
            raise DataError(
                "the processor resizes the shortest edge and does not crop, so pictures would differ in "
                f"shape; expected a fixed size: {BY_HAND}"
            )
        return int(size["shortest_edge"])
    raise DataError(f"cannot read the processor's size {size!r}, expected height and width, or shortest_edge")


def _read_crop(config: dict[str, Any]) -> tuple[int, int]:
    crop = config.get("crop_size")
    if isinstance(crop, int | float):
        return int(crop), int(crop)
    if isinstance(crop, dict) and {"height", "width"} <= crop.keys():
        return int(crop["height"]), int(crop["width"])
    raise DataError(f"cannot read the processor's crop_size {crop!r}, expected height and width")


def _read_scale(config: dict[str, Any]) -> dict[str, Any]:
    rescale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    # ViViT moves values to [-1, 1] before it normalises.
    offset = 1.0 if config.get("offset", False) else 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if config.get("do_normalize", True):
        if "image_mean" not in config or "image_std" not in config:
            raise DataError("the processor normalises but lacks image_mean or image_std, expected both")
        mean, std = _values(config["image_mean"]), _values(config["image_std"])
    return {"rescale": rescale, "mean": tuple(m + offset for m in mean), "std": std}


def _values(number_or_list: float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(number_or_list, int | float):
        return (float(number_or_list),)
    return tuple(float(v) for v in number_or_list)
