import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.paired import PairedDataModule
from datamodules.shards.writer import write_shards
from datamodules.sources.captions import describe
from datamodules.sources.encoding import json_bytes, png_bytes
from datamodules.sources.paired import CaptionedScenes, prepare
from datamodules.sources.scenes import Box, Scene


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    prepare("digits", root, train=9, val=3, test=4, seed=1, shard_size=5)
    return root


def module(root: Path, **options: object) -> PairedDataModule:
    settings = {"size": 64, "channels": 1, **options}
    return PairedDataModule(root, 4, **settings)  # type: ignore[arg-type]


def scene(*digits: tuple[int, int, int]) -> Scene:
    """Digits as (digit, row, column), 16 pixels each."""
    boxes = tuple(Box(row, column, 16) for _, row, column in digits)
    return Scene(np.zeros((64, 64), np.uint8), tuple(d for d, _, _ in digits), boxes, np.zeros(64, np.uint8))


def test_captions_say_what_is_where() -> None:
    random = np.random.RandomState(0)
    words = describe(scene((7, 10, 40), (3, 0, 2)), random)
    assert words.caption == "a 3 left of a 7"
    assert words.question == "what is left of the 7?"
    assert describe(scene((7, 40, 10), (3, 0, 2)), random).caption == "a 3 above a 7"
    three = describe(scene((7, 10, 20), (3, 0, 2), (3, 20, 44)), random)
    assert three.caption == "a 3 left of a 7 left of a 3"
    assert three.question in ("what is left of the 7?", "what is left of the 3?")
    with pytest.raises(ValueError, match="at least 2"):
        describe(scene((7, 10, 40)), random)


def test_a_batch_holds_pixels_captions_and_questions(pairs: Path) -> None:
    data = module(pairs, mean=0.0, std=1.0)
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["pixel_values"].shape == (4, 1, 64, 64)
    source = CaptionedScenes("test", 4, 1)
    for i, key in enumerate(batch["keys"]):
        picture, words = source.scene(int(key.split("-")[1]))
        np.testing.assert_allclose(batch["inputs"]["pixel_values"][i, 0] * 255, picture.canvas, atol=1e-4)
        assert data.decode_targets(batch["targets"][i]) == words.caption
        asked = batch["context"]["input_ids"][i][batch["context"]["attention_mask"][i].bool()]
        assert bytes(asked.tolist()).decode() == words.question
    assert (data.vocab_size, data.eos_id, data.modality) == (257, 256, "paired")


def tokenizer_file(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "a", "left", "of", "above", *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


def test_captions_in_any_tokenizers_ids(pairs: Path, tmp_path: Path) -> None:
    data = module(pairs, caption_tokenizer=str(tokenizer_file(tmp_path)))
    batch = next(iter(data.val_dataloader()))
    assert (data.vocab_size, data.eos_id) == (16, 15)  # one more id: this tokenizer knows no end
    _, words = CaptionedScenes("val", 3, 1).scene(0)
    assert data.decode_targets(batch["targets"][0]) == words.caption
    assert 15 in batch["targets"][0].tolist()
    with pytest.raises(DataError, match="no tokenizer in"):
        module(pairs, caption_tokenizer=str(tmp_path / "none.json"))


class Foreign:
    """Pairs as others publish them: a caption inside the json, no question."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, bytes]:
        picture = png_bytes(np.full((20, 30, 3), 40 * i, np.uint8))
        return {"__key__": b"k%d" % i, "png": picture, "json": json_bytes({"alt": f"grey {i} é"})}


def test_pairs_from_elsewhere(tmp_path: Path) -> None:
    write_shards(tmp_path, "test", Foreign(), progress=False)
    data = module(tmp_path, caption="alt", channels=3, size=16)
    batch = next(iter(data.test_dataloader()))
    assert data.decode_targets(batch["targets"][2]) == "grey 2 é"
    assert "context" not in batch
    with pytest.raises(DataError, match=r"no caption 'txt' among json, png"):
        next(iter(module(tmp_path, size=16).test_dataloader()))
    with pytest.raises(DataError, match="no caption 'title'"):
        next(iter(module(tmp_path, size=16, caption="title").test_dataloader()))


def test_targets_are_cut_and_padded(pairs: Path) -> None:
    batch = next(iter(module(pairs, target_length=5).test_dataloader()))
    assert batch["targets"].shape == (4, 5)
    assert torch.equal(batch["targets"][:, :2], torch.tensor([[97, 32]] * 4))
    assert json.loads(CaptionedScenes("test", 4, 1)[0]["digits.json"])
