"""The members of a stored sample, by the names that all modalities share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.shards.decode import decode_field

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")
DIGITS_FIELD = "digits.json"
PATCHES_FIELD = "patches.npy"
CAPTION_FIELD = "txt"
QUESTION_FIELD = "question.txt"


def read_picture(fields: dict[str, bytes]) -> NDArray[np.uint8]:
    """The sample's picture, uint8 [h,w,3].

    Raises:
        DataError: there is none, or it is damaged or too large.
    """
    name = next((n for n in IMAGE_FIELDS if n in fields), None)
    if name is None:
        found = ", ".join(sorted(fields))
        raise DataError(f"the sample has no picture among {found}, expected png, jpg, jpeg or webp")
    picture: NDArray[np.uint8] = decode_field(name, fields[name])
    return picture


def member(fields: dict[str, bytes], name: str, otherwise: str) -> bytes:
    """A member that the sample must have.

    Raises:
        DataError: it has not; `otherwise` is the setting that does without.
    """
    if name not in fields:
        found = ", ".join(sorted(fields))
        raise DataError(
            f"the sample has no {name} among {found}; prepare the shards with it or set {otherwise}"
        )
    return fields[name]
