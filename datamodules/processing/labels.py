"""What a sample is to be described by, read from its members: digits, digits as text, or text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from datamodules.errors import DataError
from datamodules.processing.fields import DIGITS_FIELD, member
from datamodules.processing.targets import ByteTargets, DigitTargets
from datamodules.shards.decode import decode_field

TargetKind = Literal["digits", "digit_text", "text"]


@dataclass(frozen=True)
class LabelReader:
    """Reads a sample's target.

    Attributes:
        kind: `digits`: the list in `digits.json`, 11 ids; `digit_text`: the same as the text "137", 257 ids, so
            that a prior can share them with text; `text`: the `txt` member, 257 ids.
    """

    kind: TargetKind

    def __post_init__(self) -> None:
        if self.kind not in ("digits", "digit_text", "text"):
            raise DataError(f'targets is {self.kind!r}, expected "digits", "digit_text" or "text"')

    @property
    def vocabulary(self) -> DigitTargets | ByteTargets:
        """Ids of this kind of target."""
        return DigitTargets() if self.kind == "digits" else ByteTargets()

    def read(self, fields: dict[str, bytes]) -> Tensor:
        """The target of a sample with its end token, long [T].

        Raises:
            DataError: the member is missing, damaged or empty.
        """
        if self.kind == "text":
            text: str = decode_field("txt", member(fields, "txt", "targets=digits"))
            if not text:
                raise DataError("the txt member is empty, expected a class name or a caption")
            return ByteTargets().encode(text.encode())
        digits = decode_field(DIGITS_FIELD, member(fields, DIGITS_FIELD, "targets=text"))
        ids = DigitTargets().encode(digits)
        return ids if self.kind == "digits" else ByteTargets().encode("".join(map(str, digits)).encode())
