"""What is where in a scene, in words: a caption of the whole, and a question about a part of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datamodules.sources.scenes import Scene


class Words(NamedTuple):
    """A scene in words.

    Attributes:
        caption: such as "a 3 left of a 7": every digit, in order.
        question: such as "what is left of the 7?", about a digit and its neighbour.
    """

    caption: str
    question: str


def describe(scene: Scene, random: np.random.RandomState) -> Words:
    """Put a scene of at least two digits into words.

    Digits are named in a row, along the axis on which their centres spread most: from left to right, or from
    top to bottom. So a scene has one caption only.

    Args:
        scene: the scene.
        random: draws which neighbours the question is about.

    Raises:
        ValueError: fewer than two digits.
    """
    if len(scene.digits) < 2:
        raise ValueError(f"the scene has {len(scene.digits)} digit(s), expected at least 2")
    centres = np.array([(box.row + box.size / 2, box.column + box.size / 2) for box in scene.boxes])
    axis = int(np.ptp(centres, axis=0).argmax())
    relation = ("above", "left of")[axis]
    row = [scene.digits[i] for i in np.argsort(centres[:, axis], kind="stable")]
    asked = row[int(random.randint(1, len(row)))]
    return Words(f" {relation} ".join(f"a {digit}" for digit in row), f"what is {relation} the {asked}?")
