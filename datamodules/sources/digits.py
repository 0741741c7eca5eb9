"""Handwritten digits: scikit-learn's 1,797 real scans, split by scan, and drawn anywhere on a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.sources.splits import SPLITS, Split

SCANS_PER_SPLIT: dict[Split, int] = {"train": 1297, "val": 200, "test": 300}
INK_LEVELS = 16.0  # the scans hold 0 to 16


@dataclass(frozen=True)
class DigitScans:
    """The scans of one split.

    Attributes:
        ink: [n,8,8] float32 in [0,1], 1 = full ink.
        digits: [n] int64 in 0..9.
        rows: [n] int64, the scan's row in scikit-learn's data set: no row is in two splits.
    """

    ink: NDArray[np.float32]
    digits: NDArray[np.int64]
    rows: NDArray[np.int64]


@cache
def load_scans(split: Split) -> DigitScans:
    """Read the scans of one split; which scan is in which split never changes.

    Args:
        split: ``train`` (1,297 scans), ``val`` (200) or ``test`` (300).

    Returns:
        The scans, which ship inside scikit-learn: nothing is downloaded.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    start = 0
    for name in SPLITS:
        stop = start + SCANS_PER_SPLIT[name]
        if name == split:
            break
        start = stop
    rows = order[start:stop]
    ink = (data.images[rows] / INK_LEVELS).astype(np.float32)
    return DigitScans(ink, data.target[rows].astype(np.int64), rows.astype(np.int64))


def enlarge(ink: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Scale one scan up, bicubic.

    Args:
        ink: [8,8] float32 in [0,1].
        size: edge of the result in pixels.

    Returns:
        [size,size] float32 in [0,1].
    """
    picture = Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(picture, dtype=np.float32), 0.0, 1.0)
