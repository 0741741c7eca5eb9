"""Our pixels against transformers' own Pillow processors, which need no torchvision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from datamodules.processing.pixel_config import from_pretrained, pixel_transform
from datamodules.processing.pixels import PixelTransform


def picture(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.RandomState(height * width).randint(0, 256, (height, width, 3)).astype(np.uint8)


def save(
    folder: Path, config: dict[str, Any], channels: int = 3, name: str = "preprocessor_config.json"
) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"num_channels": channels}))
    return str(folder)


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessorPil", {}),
    ("ViTImageProcessorPil", {"size": {"height": 20, "width": 36}, "resample": 3}),
    ("ViTImageProcessorPil", {"do_resize": False, "do_normalize": False}),
    ("ViTImageProcessorPil", {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [9, 8, 7]}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": {"height": 32, "width": 33}}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 37}, "crop_size": {"height": 31, "width": 24}}),
    (
        "DeiTImageProcessorPil",
        {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    ),
]


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
@pytest.mark.parametrize("shape", [(48, 64), (70, 33)])
def test_equal_to_the_models_own_processor(
    name: str, options: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    import transformers

    own = getattr(transformers, name)(**options)
    own.save_pretrained(tmp_path)
    source = picture(*shape)
    expected = own(Image.fromarray(source), return_tensors="pt")["pixel_values"][0]
    transform = from_pretrained(str(tmp_path))
    torch.testing.assert_close(transform.normalise(transform.pixels(source)), expected, atol=2e-6, rtol=1e-5)


def test_vivit_moves_values_before_normalising(tmp_path: Path) -> None:
    config = {
        "do_resize": False,
        "rescale_factor": 1 / 127.5,
        "offset": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    transform = from_pretrained(save(tmp_path, config))
    expected = ((torch.tensor(picture(4, 4)).permute(2, 0, 1) / 127.5 - 1) - 0.5) / 0.5
    torch.testing.assert_close(transform.normalise(transform.pixels(picture(4, 4))), expected)


def test_grey_backbone(tmp_path: Path) -> None:
    config = {"size": {"height": 8, "width": 8}, "image_mean": 0.5, "image_std": 0.5}
    transform = from_pretrained(save(tmp_path, config, channels=1))
    assert transform.pixels(picture(8, 8)).shape == (1, 8, 8)
    grey = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4, 3, axis=2)
    np.testing.assert_array_equal(transform.pixels(grey)[0], grey[..., 0])


def test_nested_configuration_comes_first(tmp_path: Path) -> None:
    inner = {"size": {"height": 4, "width": 4}, "do_normalize": False}
    save(tmp_path, {"image_processor": inner}, name="processor_config.json")
    save(tmp_path, {**inner, "size": {"height": 9, "width": 9}})
    assert from_pretrained(str(tmp_path)).size == (4, 4)


@pytest.mark.parametrize(
    ("config", "size", "crop"),
    [
        ({"size": 12}, (12, 12), None),
        ({"size": 12, "do_center_crop": True, "crop_size": 8}, 12, (8, 8)),
        (
            {"size": 12, "do_center_crop": True, "crop_size": 8, "feature_extractor_type": "DeiTX"},
            (12, 12),
            (8, 8),
        ),
        ({"size": [5, 7]}, (5, 7), None),
        ({"do_resize": False}, None, None),
    ],
)
def test_old_spellings_of_size(config: dict[str, Any], size: object, crop: object, tmp_path: Path) -> None:
    transform = from_pretrained(save(tmp_path, {**config, "do_normalize": False}))
    assert (transform.size, transform.crop) == (size, crop)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"shortest_edge": 8}}, "differ in shape"),
        ({"size": {"longest_edge": 8}}, "cannot read the processor's size"),
        ({"size": 8, "do_center_crop": True}, "crop_size None"),
        ({"size": 8, "image_mean": [0.5] * 3}, "lacks image_mean or image_std"),
        ({"size": 8, "image_mean": [0.5] * 2, "image_std": [1.0] * 3}, "mean has 2 values, expected 1 or 3"),
        ({"size": 8, "image_mean": [0.5], "image_std": [0.0]}, "std holds a 0"),
    ],
)
def test_unusable_configurations_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        from_pretrained(save(tmp_path, config))


def test_missing_or_broken_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no preprocessor_config"):
        from_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        from_pretrained("./not/there")
    with pytest.raises(DataError, match=r"found no preprocessor_config.*download=true"):
        from_pretrained("nobody/nothing")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        from_pretrained(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        from_pretrained(str(tmp_path))


def test_by_hand() -> None:
    transform = pixel_transform(None, 8, (0.1, 0.2, 0.3), 0.5, 3, False)
    values = transform.normalise(transform.pixels(np.full((8, 8, 3), 255, np.uint8)))
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([1.8, 1.6, 1.4]))
    np.testing.assert_allclose(transform.picture(values), 1.0, atol=1e-6)


@pytest.mark.parametrize("size", [0, (4, 0), (4, 4, 4)])
def test_sizes_by_hand_are_checked(size: Any) -> None:
    with pytest.raises(DataError, match="expected one edge"):
        pixel_transform(None, size, 0.5, 0.5, 3, False)
    with pytest.raises(DataError, match="channels is 4"):
        PixelTransform(4, None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (16, 24), (9, 11)])
def test_frames_of_a_clip_are_prepared_like_pictures(size: tuple[int, int] | None, channels: int) -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (3, 16, 24, 3), np.uint8)
    transform = PixelTransform(channels, size)
    frames = transform.frames(pictures)
    assert torch.equal(frames, torch.stack([transform.pixels(p) for p in pictures]))
    assert frames.is_contiguous()
