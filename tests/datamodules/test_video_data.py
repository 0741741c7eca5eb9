import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.shards.writer import write_shards
from datamodules.sources.digits import load_scans
from datamodules.sources.encoding import json_bytes, npy_bytes
from datamodules.sources.moving import draw_clip
from datamodules.sources.scenes import BACKGROUND
from datamodules.sources.video import DigitClips, prepare
from datamodules.video import VideoDataModule, join_labels


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    prepare("digits", root, train=9, val=3, test=4, frames=12, seed=1, shard_size=5)
    return root


def module(root: Path, **options: object) -> VideoDataModule:
    settings = {"size": 64, "channels": 1, "frames": 4, **options}
    return VideoDataModule(root, 4, **settings)  # type: ignore[arg-type]


def test_a_batch_holds_windows_from_the_middle_in_evaluation(clips: Path) -> None:
    data = module(clips, stride=2, tubelet=2, mean=0.0, std=1.0)
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["pixel_values"].shape == (4, 4, 1, 64, 64)
    assert batch["inputs"]["pixel_values"].dtype == torch.float32
    assert batch["patch_labels"].shape == (4, 2 * 64)
    for i, key in enumerate(batch["keys"]):
        clip = DigitClips("test", 4, 1, 12).clip(int(key.split("-")[1]))
        window = [3, 5, 7, 9]  # 6 places for a window of 7 frames in 12; the middle one begins at frame 3
        pixels = batch["inputs"]["pixel_values"][i, :, 0] * 255
        np.testing.assert_allclose(pixels, clip.frames[window], atol=1e-4)
        labels = clip.patch_labels[window].astype(np.int64)
        np.testing.assert_array_equal(batch["patch_labels"][i], join_labels(labels, 2))
        digits = sorted(clip.digits)
        assert batch["targets"][i].tolist()[: len(digits) + 1] == [*digits, 10]


def test_training_windows_start_anywhere_and_follow_the_seed(clips: Path) -> None:
    data, fields = module(clips), DigitClips("train", 9, 1, 12)[0]
    fields.pop("__key__")
    drawn = [data.decode(fields, "k", seed)["pixels"] for seed in range(40)]
    again = data.decode(fields, "k", 7)["pixels"]
    assert torch.equal(drawn[7], again)
    starts = {pixels.numpy().tobytes() for pixels in drawn}
    assert len(starts) == 9  # every place that a window of 4 frames has in 12


def test_a_clip_shorter_than_the_window_is_named(clips: Path) -> None:
    data = module(clips, frames=8, stride=2)
    with pytest.raises(DataError, match="has 12 frames, a window of 8 with stride 2 needs 15"):
        next(iter(data.test_dataloader()))


def test_frames_and_tubelet_are_those_of_the_backbone(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": [0.5]})
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"num_channels": 1, "num_frames": 6, "tubelet_size": [3, 16, 16]})
    )
    data = VideoDataModule("none", 2, processor=str(tmp_path))
    assert (data.frames, data.tubelet, data.pixels.channels) == (6, 3, 1)
    with pytest.raises(DataError, match="multiple of tubelet"):
        VideoDataModule("none", 2, processor=str(tmp_path), frames=4)


def test_a_label_of_a_tubelet_is_the_first_that_is_no_background() -> None:
    b = BACKGROUND
    labels = np.array([[1, b, b], [2, 3, b], [b, b, 4], [5, b, 6]])
    assert join_labels(labels, 2).tolist() == [1, 3, b, 5, b, 4]
    assert join_labels(labels, 1).tolist() == labels.reshape(-1).tolist()


def test_digits_stay_on_the_canvas_and_bounce() -> None:
    random = np.random.RandomState(3)
    for _ in range(20):
        clip = draw_clip(load_scans("val"), random, frames=30, fastest=9.0)
        ink = [int(frame.astype(int).sum()) for frame in clip.frames]
        assert min(ink) > 0.4 * max(ink)  # overlap hides a part, the edge never does
        assert 2 <= len(clip.digits) <= 3
    still = draw_clip(load_scans("val"), random, frames=5, fastest=0.0)
    assert all((frame == still.frames[0]).all() for frame in still.frames)


def test_splits_use_different_scans_and_the_same_bytes_come_again() -> None:
    one, two = DigitClips("train", 3, 0)[1], DigitClips("train", 3, 0)[1]
    assert one == two
    assert one != DigitClips("val", 3, 0)[1] | {"__key__": one["__key__"]}


def test_digits_as_text_and_pictures_for_people(clips: Path) -> None:
    data = pickle.loads(pickle.dumps(module(clips, targets="digit_text")))  # noqa: S301  # as a worker gets it
    batch = next(iter(data.val_dataloader()))
    assert (data.vocab_size, data.eos_id) == (257, 256)
    digits = DigitClips("val", 3, 1, 12).clip(0).digits
    assert data.decode_targets(batch["targets"][0]) == "".join(map(str, sorted(digits)))
    picture = data.describe_input(batch, 0)
    assert picture.shape == (4, 64, 64)
    assert 0.0 <= picture.min() < picture.max() <= 1.0


class Arrays:
    """Clips of one's own: an array, and a caption."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict[str, bytes]:
        frames = np.random.RandomState(i).randint(0, 256, (5, 20, 24, 3), np.uint8)
        return {
            "__key__": b"k%d" % i,
            "frames.npy": npy_bytes(frames),
            "txt": b"noise",
            "x.json": json_bytes(i),
        }


def test_clips_of_ones_own(tmp_path: Path) -> None:
    write_shards(tmp_path, "test", Arrays(), progress=False)
    data = module(tmp_path, channels=3, size=16, targets="text")
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["pixel_values"].shape == (4, 4, 3, 16, 16)
    assert data.decode_targets(batch["targets"][0]) == "noise"
    assert batch["valid"].tolist() == [True, True, True, False]
