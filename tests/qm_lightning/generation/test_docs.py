"""The example in docs/export.md runs as it stands, but for the model's name."""

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

DOCS = Path(__file__).parents[3] / "docs" / "export.md"


def small_bert(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", *["The", "committee", "met", "in", "Paris", ".", "A", "quick", "brown", "fox"]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": words[0], "unk_token": words[1]}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def test_compress_in_ten_lines(tmp_path: Path) -> None:
    small_bert(tmp_path)
    found = re.search(r"<!-- example.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    code = found[1]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 8
    code, replaced = re.subn(r'^name = ".*"$', f"name = {str(tmp_path)!r}", code, flags=re.MULTILINE)
    assert replaced == 1
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102  # our own documentation
    merged, mask = scope["merged"], scope["inputs"]["attention_mask"].bool()
    assert merged.values.shape == (2, 3, 16)
    assert merged.mask.sum(1).tolist() == [3, 2]  # 6 words, and 5
    assert bool((merged.assignment[mask] >= 0).all())
    assert torch.equal(merged.assignment == -1, ~mask)
