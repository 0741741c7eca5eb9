"""Clips of real handwritten digits that bounce in a square, with a label for every patch of every frame.

The recipe is that of Moving MNIST (Srivastava et al., 2015): two to three digits, random velocities, walls
that reflect; on scikit-learn's scans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.sources.digits import DigitScans, enlarge
from datamodules.sources.scenes import CANVAS, label_patches

FRAMES = 16
DIGITS = (2, 3)  # fewest and most digits of a clip
SIZES = (18, 24)  # pixels, smallest and largest edge of a digit
FASTEST = 5.0  # pixels per frame


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        frames: [F,64,64] uint8, 0 = no ink.
        digits: the digits, in the order in which they were drawn.
        patch_labels: [F,64] uint8, each frame's patches in raster order: the digit with most ink, or 10.
    """

    frames: NDArray[np.uint8]
    digits: tuple[int, ...]
    patch_labels: NDArray[np.uint8]


def draw_clip(
    scans: DigitScans, random: np.random.RandomState, frames: int = FRAMES, fastest: float = FASTEST
) -> Clip:
    """Draw 2 to 3 scans that start anywhere and move in any direction.

    Args:
        scans: the split's scans.
        random: the only source of chance, so equal states give equal clips.
        frames: length of the clip.
        fastest: pixels per frame; each digit's speed is drawn from 0 up to it.

    Returns:
        The clip.
    """
    count = int(random.randint(DIGITS[0], DIGITS[1] + 1))
    chosen = random.randint(len(scans.digits), size=count)
    layers = np.zeros((count, frames, CANVAS, CANVAS), dtype=np.float32)
    for layer, scan in zip(layers, chosen, strict=True):
        size = int(random.randint(SIZES[0], SIZES[1] + 1))
        ink = enlarge(scans.ink[scan], size)
        for frame, (row, column) in zip(layer, _path(random, frames, CANVAS - size, fastest), strict=True):
            frame[row : row + size, column : column + size] = ink
    digits = scans.digits[chosen]
    labels = [label_patches(layers[:, f], digits) for f in range(frames)]
    pixels = (layers.max(axis=0) * 255.0).round().astype(np.uint8)
    return Clip(pixels, tuple(int(d) for d in digits), np.stack(labels))


def _path(random: np.random.RandomState, frames: int, room: int, fastest: float) -> NDArray[np.int64]:
    """Top left corners [F,2] of a digit that is reflected at 0 and at `room`."""
    start = random.uniform(0, room, size=2)
    angle, speed = random.uniform(0, 2 * np.pi), random.uniform(0, fastest)
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    straight = start + np.arange(frames)[:, None] * velocity
    # Unfolded, a reflected path is a straight one: folding it at 0 and `room` gives the bounces.
    folded = np.abs((straight + room) % (2 * room) - room)
    return np.asarray(folded.round(), dtype=np.int64)
