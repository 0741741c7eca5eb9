"""Loads a tokenizer: a folder, a `tokenizer.json` of the tokenizers library, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.processing.pretrained import find_source, network
from datamodules.processing.targets import ByteTargets, until_end

BYTES = "bytes"


def load_tokenizer(name_or_path: str, download: bool) -> Any:
    """A transformers tokenizer.

    Args:
        name_or_path: folder that a tokenizer was saved to, a file ending in `.json`, or a hub name.
        download: fetch it by its name.

    Raises:
        DataError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if name_or_path.endswith(".json"):
            if not Path(name_or_path).is_file():
                raise OSError("there is no such file")
            return PreTrainedTokenizerFast(tokenizer_file=name_or_path)
        source = find_source(name_or_path)
        with network(download):
            return AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=not download
            )
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        reason = " ".join(str(error).split())
        raise DataError(
            f"found no tokenizer in {name_or_path!r} ({reason}); give tokenizer=bytes for a byte-level "
            "backbone, the folder that its tokenizer was saved to, its tokenizer.json, or a name with download=true"
        ) from None


class TokenTargets:
    """Targets in a tokenizer's own ids, closed by its end token; one more id where it has none.

    Args:
        name_or_path: see `load_tokenizer`.
        download: fetch it by its name.
    """

    def __init__(self, name_or_path: str, download: bool) -> None:
        self._tokenizer = load_tokenizer(name_or_path, download)
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        end = next((i for i in ends if i is not None), None)
        self.eos_id = len(self._tokenizer) if end is None else int(end)
        self.vocab_size = max(len(self._tokenizer), self.eos_id + 1)

    def encode(self, text: bytes) -> Tensor:
        """Ids of a UTF-8 text without special tokens, then the end token; long [T]."""
        ids = self._tokenizer(text.decode("utf-8"), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.eos_id])

    def decode(self, ids: Tensor) -> str:
        """Text before the first end token."""
        return str(self._tokenizer.decode(until_end(ids, self.eos_id), skip_special_tokens=True))


def text_targets(tokenizer: str, download: bool) -> ByteTargets | TokenTargets:
    """Targets as bytes, or in a tokenizer's ids."""
    return ByteTargets() if tokenizer == BYTES else TokenTargets(tokenizer, download)
