from pathlib import Path

import pytest
import torch

from datamodules.errors import DataError
from datamodules.shards.writer import write_shards
from datamodules.sources.text import StdlibSamples, prepare
from datamodules.sources.text_tasks import Lengths
from datamodules.text import TextDataModule


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("passages")
    prepare(
        "stdlib", root, task="continuation", context_bytes=48, target_bytes=8, train=10, val=3, test=4, seed=1
    )
    return root


def shards(root: Path, *pairs: tuple[bytes, bytes]) -> Path:
    samples = [{"__key__": f"s{i}".encode(), "txt": c, "target.txt": t} for i, (c, t) in enumerate(pairs)]
    write_shards(root, "test", samples, progress=False)
    return root


def test_a_batch_holds_bytes_and_targets(passages: Path) -> None:
    data = TextDataModule(passages, 4)
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["input_ids"].shape == batch["inputs"]["attention_mask"].shape == (4, 48)
    assert batch["targets"].shape == (4, 9)
    assert (data.modality, data.vocab_size, data.eos_id) == ("text", 257, 256)
    source = StdlibSamples("test", 4, 1, "continuation", Lengths(48, 8))
    for i, key in enumerate(batch["keys"]):
        sample = source[int(key.split("-")[1])]
        assert bytes(batch["inputs"]["input_ids"][i].tolist()) == sample["txt"]
        assert bytes(batch["targets"][i, :-1].tolist()) == sample["target.txt"]
        assert batch["targets"][i, -1] == 256
        assert data.decode_targets(batch["targets"][i]).encode() == sample["target.txt"]
        assert "".join(data.describe_input(batch, i)).encode() == sample["txt"]


def test_shorter_contexts_are_padded_on_the_right_and_longer_ones_lose_their_beginning(
    tmp_path: Path,
) -> None:
    data = TextDataModule(shards(tmp_path, (b"ab", b"x"), (b"abcdef", b"yz")), 2, context_length=4)
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["input_ids"].tolist() == [[97, 98, 0, 0], [99, 100, 101, 102]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["targets"].tolist() == [[120, 256, -100], [121, 122, 256]]
    assert data.describe_input(batch, 0) == ["a", "b"]


def test_targets_are_cut(tmp_path: Path) -> None:
    data = TextDataModule(shards(tmp_path, (b"a", b"wxyz")), 1, target_length=3)
    assert next(iter(data.test_dataloader()))["targets"].tolist() == [[119, 120, 121]]


def test_bytes_beyond_ascii(tmp_path: Path) -> None:
    data = TextDataModule(shards(tmp_path, ("é".encode(), "ü".encode())), 1)
    batch = next(iter(data.test_dataloader()))
    assert data.describe_input(batch, 0) == ["c3", "a9"]
    assert data.decode_targets(batch["targets"][0]) == "ü"
    assert data.decode_targets(torch.tensor([0xC3, 256])) == "�"


@pytest.mark.parametrize(
    ("context", "message"), [(b"", "text is empty"), (b"\xff\xfe", "not UTF-8"), (b"ok\xc3", "not UTF-8")]
)
def test_bad_text_is_named(context: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(TextDataModule(shards(tmp_path, (context, b"x")), 1).test_dataloader())
    assert "'s0'" in str(caught.value)


def test_the_text_itself_as_targets(tmp_path: Path) -> None:
    write_shards(
        tmp_path, "test", [{"__key__": b"a", "txt": b"ab"}, {"__key__": b"b", "txt": b"abc"}], progress=False
    )
    data = TextDataModule(tmp_path, 2, targets="text")
    batch = next(iter(data.test_dataloader()))
    assert batch["targets"].tolist() == [[97, 98, -100], [97, 98, 99]]
    assert (data.vocab_size, data.eos_id) == (257, 256)
    assert data.decode_targets(batch["targets"][0]) == "ab"


def test_texts_of_similar_length_come_together(tmp_path: Path) -> None:
    """`bucket_batches` spares padding, and each text still comes once."""
    lengths = [1 + 700 * (i * 7 % 12) for i in range(96)]
    texts = [{"__key__": f"s{i:02d}".encode(), "txt": b"x" * n} for i, n in enumerate(lengths)]
    write_shards(tmp_path, "train", texts, progress=False)

    def padded(bucket_batches: int) -> int:
        data = TextDataModule(
            tmp_path, 4, targets="text", context_length=9000, window=0, bucket_batches=bucket_batches
        )
        batches = list(data.train_dataloader())
        assert sorted(key for b in batches for key in b["keys"]) == [f"s{i:02d}" for i in range(96)]
        return sum(int((b["inputs"]["attention_mask"] == 0).sum()) for b in batches)

    assert padded(bucket_batches=24) < 0.25 * padded(bucket_batches=0)


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "test", [{"__key__": b"a", "txt": b"text"}], progress=False)
    with pytest.raises(DataError, match=r"no target\.txt among txt"):
        list(TextDataModule(tmp_path, 1).test_dataloader())


def save_tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "import", "os", "sys", "def"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, words[1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), words, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


def test_the_backbones_own_tokenizer(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "backbone")
    root = shards(tmp_path / "data", (b"import os", b"x"), (b"def import os sys", b"y"))
    data = TextDataModule(root, 2, tokenizer=name, context_length=5, num_workers=1, start_method="spawn")
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"]["input_ids"].tolist() == [[2, 4, 5, 3, 0], [2, 4, 5, 6, 3]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert data.describe_input(batch, 0) == ["[CLS]", "import", "os", "[SEP]"]
    assert data.vocab_size == 257


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TextDataModule(tmp_path, 1, tokenizer="./nowhere")
    with pytest.raises(DataError, match=r"no tokenizer in 'nobody/nothing'.*download=true"):
        TextDataModule(tmp_path, 1, tokenizer="nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no tokenizer in"):
        TextDataModule(tmp_path, 1, tokenizer=str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["context_length", "target_length"])
def test_lengths_are_checked(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} (is )?0"):
        TextDataModule(tmp_path, 1, **{name: 0})
