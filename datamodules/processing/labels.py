"""What a sample is to be described by, read from its members: digits, text, or a set of labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from datamodules.errors import DataError
from datamodules.processing.fields import DIGITS_FIELD, member
from datamodules.processing.label_sets import DigitLabels, TextLabels, digit_words
from datamodules.processing.targets import ByteTargets, DigitTargets
from datamodules.shards.decode import decode_field

TargetKind = Literal["digits", "digit_text", "text", "digit_labels", "word_labels", "text_labels"]


@dataclass(frozen=True)
class LabelReader:
    """Reads a sample's target.

    Attributes:
        kind: `digits`: the list in `digits.json`, 11 ids; `digit_text`: the same as the text "137", 257 ids, so
            that a prior can share them with text; `text`: the `txt` member, 257 ids; and label sets, for labels as
            next tokens: `digit_labels` (11 ids), `word_labels` (digits spelt as words, 257 ids), `text_labels` (the
            `txt` member, a list with commas, 257 ids).
        length: room of a label set, in tokens: labels that do not fit are left out whole.
    """

    kind: TargetKind
    length: int = 64

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise DataError(f"targets is {self.kind!r}, expected one of {', '.join(get_args(TargetKind))}")

    @property
    def is_set(self) -> bool:
        """Whether targets are label sets."""
        return self.kind.endswith("labels")

    @property
    def vocabulary(self) -> DigitTargets | ByteTargets | DigitLabels | TextLabels:
        """Ids of this kind of target."""
        if self.is_set:
            return DigitLabels() if self.kind == "digit_labels" else TextLabels()
        return DigitTargets() if self.kind == "digits" else ByteTargets()

    def read(self, fields: dict[str, bytes], seed: int = 0) -> Tensor:
        """The target of a sample, long [T].

        Args:
            fields: the sample's members.
            seed: of the order of a label set.

        Raises:
            DataError: the member is missing, damaged or empty.
        """
        if self.kind in ("text", "text_labels"):
            text: str = decode_field("txt", member(fields, "txt", "targets=digits"))
            if not text.strip():
                raise DataError("the txt member is empty, expected a class name or a caption")
            if self.kind == "text":
                return ByteTargets().encode(text.encode())
            return TextLabels().encode(text, self.length, seed)
        digits = decode_field(DIGITS_FIELD, member(fields, DIGITS_FIELD, "targets=text"))
        if self.kind == "digit_labels":
            return DigitLabels().encode(digits, self.length, seed)
        ids = DigitTargets().encode(digits)
        if self.kind == "digits":
            return ids
        if self.kind == "word_labels":
            return TextLabels().encode(digit_words(digits), self.length, seed)
        return ByteTargets().encode("".join(map(str, digits)).encode())
