import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.image import ImageDataModule
from datamodules.shards.writer import write_shards
from datamodules.sources.encoding import json_bytes, png_bytes
from datamodules.sources.image import DigitScenes, prepare


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    prepare("digits", root, train=10, val=3, test=4, seed=1, shard_size=4)
    return root


def module(root: Path, **options: object) -> ImageDataModule:
    settings = {"size": 64, "channels": 1, **options}
    return ImageDataModule(root, 4, **settings)  # type: ignore[arg-type]


def test_a_batch_holds_pixels_targets_and_patch_labels(scenes: Path) -> None:
    batch = next(iter(module(scenes, mean=0.0, std=1.0).test_dataloader()))
    assert batch["inputs"]["pixel_values"].shape == (4, 1, 64, 64)
    assert batch["inputs"]["pixel_values"].dtype == torch.float32
    assert batch["patch_labels"].shape == (4, 64)
    assert batch["patch_labels"].dtype == torch.long
    source = DigitScenes("test", 4, 1)
    for i, key in enumerate(batch["keys"]):
        sample = source[int(key.split("-")[1])]
        scene = source.scene(int(key.split("-")[1]))
        np.testing.assert_allclose(batch["inputs"]["pixel_values"][i, 0] * 255, scene.canvas, atol=1e-4)
        np.testing.assert_array_equal(batch["patch_labels"][i], scene.patch_labels)
        digits = json.loads(sample["digits.json"])
        assert batch["targets"][i].tolist()[: len(digits) + 1] == [*digits, 10]
        assert set(batch["targets"][i].tolist()[len(digits) + 1 :]) <= {-100}


def test_each_training_sample_comes_once(scenes: Path) -> None:
    keys = [
        k for b in module(scenes).train_dataloader() for k, v in zip(b["keys"], b["valid"], strict=True) if v
    ]
    assert sorted(keys) == [f"train-{i:06d}" for i in range(10)]


def test_targets_read_back(scenes: Path) -> None:
    data = module(scenes)
    assert (data.vocab_size, data.eos_id, data.modality) == (11, 10, "image")
    assert data.decode_targets(torch.tensor([1, 3, 10, -100])) == "1 3"
    assert data.decode_targets(torch.tensor([2, 2])) == "2 2"


def test_picture_undoes_normalising(scenes: Path) -> None:
    data = module(scenes, mean=0.3, std=0.2)
    batch = next(iter(data.val_dataloader()))
    shown = data.describe_input(batch, 0)
    assert shown.shape == (64, 64)
    expected = DigitScenes("val", 3, 1).scene(int(batch["keys"][0].split("-")[1])).canvas / 255
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_colour_pictures_with_names(tmp_path: Path) -> None:
    picture = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    write_shards(
        tmp_path, "test", [{"__key__": b"a", "png": png_bytes(picture), "txt": b"red fox"}], progress=False
    )
    data = ImageDataModule(tmp_path, 2, size=(20, 30), targets="text")
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["pixel_values"].shape == (2, 3, 20, 30)
    assert batch["valid"].tolist() == [True, False]
    assert bytes(batch["targets"][0, :-1].tolist()) == b"red fox"
    assert batch["targets"][0, -1] == data.eos_id == 256
    assert data.decode_targets(batch["targets"][0]) == "red fox"
    np.testing.assert_allclose(data.describe_input(batch, 0), picture / 255, atol=1e-6)
    assert "patch_labels" not in batch


def test_long_targets_are_cut(tmp_path: Path) -> None:
    sample = {"__key__": b"a", "png": png_bytes(np.zeros((8, 8), np.uint8)), "txt": b"x" * 50}
    write_shards(tmp_path, "test", [sample], progress=False)
    data = ImageDataModule(tmp_path, 1, size=8, targets="text", target_length=7)
    assert next(iter(data.test_dataloader()))["targets"].shape == (1, 7)


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"txt": b"x", "digits.json": b"[1]"}, {}, "no picture among digits.json, txt"),
        ({"png": b"", "txt": b"x"}, {}, "no digits.json among png, txt.*set targets=text"),
        ({"png": b"", "digits.json": b"[1]"}, {"targets": "text"}, "no txt among.*set targets=digits"),
        ({"png": b"", "txt": b""}, {"targets": "text"}, "txt member is empty"),
        ({"png": b"", "digits.json": b"[10]"}, {}, "expected a list of digits"),
        ({"png": b"broken", "digits.json": b"[1]"}, {}, "'png'"),
    ],
)
def test_bad_samples_are_named(
    sample: dict[str, bytes], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    if sample.get("png") == b"":
        sample = {**sample, "png": png_bytes(np.zeros((8, 8), np.uint8))}
    write_shards(tmp_path, "test", [{"__key__": b"one", **sample}], progress=False)
    with pytest.raises(DataError, match=message) as caught:
        list(module(tmp_path, size=8, **options).test_dataloader())
    assert "'one'" in str(caught.value)


def test_a_bad_sample_is_skipped_within_its_budget(tmp_path: Path) -> None:
    picture = png_bytes(np.zeros((8, 8), np.uint8))
    samples = [{"__key__": f"{i}".encode(), "png": picture, "digits.json": json_bytes([i])} for i in range(8)]
    samples[3]["png"] = picture[:40]
    write_shards(tmp_path, "train", samples, progress=False)
    data = module(tmp_path, size=8, on_error="skip", max_bad=1, max_bad_share=0.2, shuffle=False)
    batches = list(data.train_dataloader())
    valid = [k for b in batches for k, v in zip(b["keys"], b["valid"], strict=True) if v]
    assert valid == [str(i) for i in range(8) if i != 3]
    with pytest.raises(DataError, match="max_bad"):
        list(module(tmp_path, size=8, on_error="skip", max_bad=0).train_dataloader())


@pytest.mark.parametrize("options", [{"size": None}, {"size": 8, "processor": "x"}])
def test_processor_or_size(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of processor and size"):
        module(tmp_path, **options)


def test_it_travels_to_spawned_workers(scenes: Path) -> None:
    data = module(scenes, num_workers=1, start_method="spawn")
    there = [k for b in data.train_dataloader() for k in b["keys"]]
    here = [k for b in module(scenes).train_dataloader() for k in b["keys"]]
    assert there == here
    assert pickle.loads(pickle.dumps(data)).vocab_size == 11  # noqa: S301 our own bytes
