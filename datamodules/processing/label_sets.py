"""Target vocabularies of label sets: each label's tokens and then a separator, in an order drawn per sample.

For training labels as next tokens (docs/nxtp.md). A label is there or not: what occurs twice is one label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.processing.targets import PADDING, checked_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def drawn_order(labels: Sequence[list[int]], sep: int, length: int, seed: int) -> Tensor:
    """Lay labels out one after the other.

    Args:
        labels: token ids of each label, without separator.
        sep: the separator's id.
        length: room; labels that no longer fit are left out whole.
        seed: of the order.

    Returns:
        long [<=length], each label followed by the separator.

    Raises:
        DataError: there is no label, or the first one does not fit.
    """
    order = np.random.RandomState(seed % 2**32).permutation(len(labels))
    row: list[int] = []
    for i in order:
        if len(row) + len(labels[i]) + 1 <= length:
            row += [*labels[i], sep]
    if not row:
        raise DataError(
            f"the sample has {len(labels)} labels and none fits into {length} tokens; expected at least one; "
            "raise target_length or drop the sample"
        )
    return torch.tensor(row)


def split_at(ids: Tensor, sep: int) -> list[list[int]]:
    """Token ids of each label, padding and separators left out; a last label may lack its separator."""
    labels: list[list[int]] = [[]]
    for token in ids.tolist():
        if token == PADDING:
            continue
        if token == sep:
            labels.append([])
        else:
            labels[-1].append(int(token))
    return [label for label in labels if label]


class DigitLabels:
    """The digits that occur, one token each; 10 separates, 11 ids."""

    vocab_size = 11
    eos_id = 10

    def encode(self, digits: Sequence[int], length: int, seed: int) -> Tensor:
        """Distinct digits, each followed by the separator; long [T].

        Raises:
            DataError: something else than digits 0 to 9, or none.
        """
        return drawn_order([[d] for d in sorted(set(checked_digits(digits)))], self.eos_id, length, seed)

    def decode(self, ids: Tensor) -> str:
        """Labels with commas between them, such as "7, 3"."""
        return ", ".join("".join(map(str, label)) for label in split_at(ids, self.eos_id))


class TextLabels:
    """Labels as UTF-8 bytes; 256 separates, 257 ids."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str, length: int, seed: int) -> Tensor:
        """Distinct labels of a comma-separated list, lower-cased; long [T].

        Raises:
            DataError: there is none.
        """
        names = dict.fromkeys(name for part in text.split(",") if (name := part.strip().lower()))
        return drawn_order([[*name.encode()] for name in names], self.eos_id, length, seed)

    def decode(self, ids: Tensor) -> str:
        """Labels with commas between them; bytes that are not UTF-8 become the replacement character."""
        labels = split_at(ids, self.eos_id)
        return ", ".join(bytes(label).decode("utf-8", errors="replace") for label in labels)


def digit_words(digits: Sequence[int]) -> str:
    """Digits 0 to 9 spelt in English, with commas between them: "three, seven"."""
    return ", ".join(WORDS[d] for d in digits)
