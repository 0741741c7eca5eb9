"""Reads a context for a text backbone: as bytes, or through the backbone's own tokenizer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.errors import DataError
from datamodules.processing.targets import ByteTargets, until_end
from datamodules.processing.tokenizer import BYTES, load_tokenizer


class TextReader(Protocol):
    """From stored text to what a text backbone takes. Picklable.

    Attributes:
        vocab_size: number of ids, an end token included.
        eos_id: the end token.
    """

    vocab_size: int
    eos_id: int

    def prepare(self, text: bytes) -> Any:
        """Check one text and make it ready for `batch`.

        Raises:
            DataError: it is empty or not UTF-8.
        """
        ...

    def batch(self, texts: list[Any]) -> dict[str, Tensor]:
        """`input_ids` long [B,N] and `attention_mask` long [B,N] (1 = real), padded on the right."""
        ...

    def tokens(self, ids: Tensor) -> list[str]:
        """Each id of long [N] as a readable string."""
        ...

    def decode(self, ids: Tensor) -> str:
        """Text of long [N], up to the first end token; padding (below 0) is left out."""
        ...


def text_reader(tokenizer: str, length: int, download: bool) -> TextReader:
    """The reader for `bytes`, or for a backbone's own tokenizer by folder or hub name.

    Args:
        tokenizer: `bytes`, folder or name.
        length: longest text in tokens; of longer ones the end is kept.
        download: fetch a tokenizer by its name.

    Raises:
        DataError: there is no such tokenizer.
    """
    return ByteReader(length) if tokenizer == BYTES else TokenizerReader(tokenizer, length, download)


def checked_text(text: bytes) -> str:
    """A stored text.

    Raises:
        DataError: it is empty or not UTF-8.
    """
    if not text:
        raise DataError("the text is empty, expected at least one character")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the text is not UTF-8 ({error}); convert it, or set on_error=skip") from None


class ByteReader:
    """One token per byte, ids 0 to 255.

    Args:
        length: of longer texts the last `length` bytes are kept.
    """

    vocab_size, eos_id = ByteTargets.vocab_size, ByteTargets.eos_id

    def __init__(self, length: int) -> None:
        self._length = length

    def prepare(self, text: bytes) -> Tensor:
        """Ids of one text, uint8 [N]."""
        checked_text(text)
        return torch.from_numpy(np.frombuffer(text[-self._length :], np.uint8).copy())

    def batch(self, texts: list[Tensor]) -> dict[str, Tensor]:
        """Ids and mask; padding has id 0."""
        lengths = torch.tensor([len(t) for t in texts])
        ids = pad_sequence(texts, batch_first=True).long()
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    def tokens(self, ids: Tensor) -> list[str]:
        """ASCII bytes as themselves, the others as two hexadecimal digits."""
        return [chr(i) if i < 128 else f"{i:02x}" for i in ids.tolist()]

    def decode(self, ids: Tensor) -> str:
        """UTF-8 text; other bytes become the replacement character."""
        return ByteTargets().decode(ids)


class TokenizerReader:
    """A backbone's own tokenizer, with the special tokens it adds.

    Args:
        name_or_path: folder, `tokenizer.json` or hub name.
        length: longest text in tokens, special tokens included.
        download: fetch it by its name.
    """

    def __init__(self, name_or_path: str, length: int, download: bool) -> None:
        self._tokenizer = load_tokenizer(name_or_path, download)
        self._tokenizer.truncation_side, self._tokenizer.padding_side = "left", "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._length = length
        # Some tokenizers know no end; then nothing ends a text.
        self.vocab_size = len(self._tokenizer)
        self.eos_id = -1 if self._tokenizer.eos_token_id is None else int(self._tokenizer.eos_token_id)

    def prepare(self, text: bytes) -> str:
        """One text, decoded."""
        return checked_text(text)

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        """Ids and mask, as the tokenizer gives them."""
        out = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def tokens(self, ids: Tensor) -> list[str]:
        """Each token's own text."""
        return [self._tokenizer.decode([i]) for i in ids.tolist()]

    def decode(self, ids: Tensor) -> str:
        """Text of long [N], as the tokenizer joins it."""
        return str(self._tokenizer.decode(until_end(ids, self.eos_id), skip_special_tokens=True))
