"""Target vocabularies: digits, bytes, or a pre-trained tokenizer; all close a target with an end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.errors import DataError

PADDING = -100


class TargetVocabulary(Protocol):
    """Turns a target into token ids and back.

    Attributes:
        vocab_size: number of ids, the end token included.
        eos_id: the end token.
    """

    vocab_size: int
    eos_id: int

    def decode(self, ids: Tensor) -> str:
        """Text of target ids, long [T]; stops at the end token, leaves out padding."""
        ...


class DigitTargets:
    """Digits 0 to 9 and an end token, 11 ids."""

    vocab_size = 11
    eos_id = 10

    def encode(self, digits: Sequence[int]) -> Tensor:
        """Digits in the order given, then the end token; long [T].

        Raises:
            DataError: something else than digits 0 to 9.
        """
        return torch.tensor([*checked_digits(digits), self.eos_id])

    def decode(self, ids: Tensor) -> str:
        """Digits with spaces between them, such as "1 3 7"."""
        return " ".join(str(i) for i in until_end(ids, self.eos_id))


def checked_digits(stored: Any) -> list[int]:
    """What a JSON member holds, if it is a list of digits.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(stored, list | tuple) or not all(type(d) is int and 0 <= d <= 9 for d in stored):
        raise DataError(f"the labels are {stored!r:.80}, expected a list of digits 0 to 9")
    return list(stored)


class ByteTargets:
    """Bytes and an end byte, 257 ids."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: bytes) -> Tensor:
        """Bytes, then the end byte; long [T]."""
        return torch.tensor([*text, self.eos_id])

    def decode(self, ids: Tensor) -> str:
        """UTF-8 text; bytes that are not UTF-8 become the replacement character."""
        return bytes(until_end(ids, self.eos_id)).decode("utf-8", errors="replace")


def until_end(ids: Tensor, eos_id: int) -> list[int]:
    """Ids before the first end token, without padding."""
    kept: list[int] = []
    for i in ids.tolist():
        if i == eos_id:
            break
        if i >= 0:
            kept.append(int(i))
    return kept


def pad_targets(targets: list[Tensor], length: int | None = None) -> Tensor:
    """Put targets side by side.

    Args:
        targets: B tensors, long [T_i].
        length: longer targets are cut off there.

    Returns:
        long [B,T], -100 behind each target's end.
    """
    return pad_sequence([t[:length] for t in targets], batch_first=True, padding_value=PADDING)
