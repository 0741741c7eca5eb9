"""Scenes: a few real handwritten digits on a noisy canvas, with a label for every patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.sources.digits import DigitScans, enlarge

CANVAS = 64  # pixels
PATCH = 8  # pixels, so 8 x 8 = 64 patches
BACKGROUND = 10  # the patch label beside the digits 0..9
MAX_DIGITS = 4
SIZES = (16, 24)  # pixels, smallest and largest edge of a digit
NOISE = 0.12  # standard deviation of the canvas noise, full ink = 1
PATCH_INK = 0.06  # mean ink from which a patch counts as part of a digit
MAX_SHARED = 0.15  # share of a digit's box that may lie on another digit's box
PLACEMENT_TRIES = 30


@dataclass(frozen=True)
class Box:
    """Where one digit lies; pixels, the top left corner of the canvas is (0, 0)."""

    row: int
    column: int
    size: int

    def shared(self, other: Box) -> float:
        """Share of the smaller of two boxes that the other one covers, in [0,1]."""
        rows = min(self.row + self.size, other.row + other.size) - max(self.row, other.row)
        columns = min(self.column + self.size, other.column + other.size) - max(self.column, other.column)
        return max(rows, 0) * max(columns, 0) / min(self.size, other.size) ** 2


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        canvas: [64,64] uint8, 0 = no ink.
        digits: the digits, in the order of ``boxes``.
        boxes: where they lie.
        patch_labels: [64] uint8 in raster order: the digit with most ink in the patch, or 10 = background.
    """

    canvas: NDArray[np.uint8]
    digits: tuple[int, ...]
    boxes: tuple[Box, ...]
    patch_labels: NDArray[np.uint8]


def draw_scene(scans: DigitScans, random: np.random.RandomState, count: int | None = None) -> Scene:
    """Draw 1 to 4 scans at random places, sizes and strengths.

    Args:
        scans: the split's scans.
        random: the only source of chance, so equal states give equal scenes.
        count: digits wanted; drawn from 1..4 by default. Fewer lie on the scene when there is no room.

    Returns:
        The scene.
    """
    wanted = int(random.randint(1, MAX_DIGITS + 1)) if count is None else count
    boxes = _place(wanted, random)
    chosen = random.randint(len(scans.digits), size=len(boxes))
    layers = np.zeros((len(boxes), CANVAS, CANVAS), dtype=np.float32)
    for layer, box, scan in zip(layers, boxes, chosen, strict=True):
        ink = enlarge(scans.ink[scan], box.size) * random.uniform(0.6, 1.0)
        layer[box.row : box.row + box.size, box.column : box.column + box.size] = ink
    digits = scans.digits[chosen]
    noisy = layers.max(axis=0) + random.normal(0.0, NOISE, (CANVAS, CANVAS))
    canvas = (np.clip(noisy, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return Scene(canvas, tuple(int(d) for d in digits), boxes, label_patches(layers, digits))


def _place(count: int, random: np.random.RandomState) -> tuple[Box, ...]:
    """Places that hardly overlap; a digit that finds none after 30 tries is left out."""
    boxes: list[Box] = []
    for _ in range(count):
        for _ in range(PLACEMENT_TRIES):
            size = int(random.randint(SIZES[0], SIZES[1] + 1))
            row, column = (int(v) for v in random.randint(CANVAS - size + 1, size=2))
            box = Box(row, column, size)
            if all(box.shared(other) <= MAX_SHARED for other in boxes):
                boxes.append(box)
                break
    return tuple(boxes)


def label_patches(layers: NDArray[np.float32], digits: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The digit with most ink per patch; [count,64,64] ink per digit -> [64] uint8."""
    side = CANVAS // PATCH
    ink = layers.reshape(len(layers), side, PATCH, side, PATCH).mean(axis=(2, 4)).reshape(len(layers), -1)
    owner = digits[ink.argmax(axis=0)]
    return np.where(ink.max(axis=0) >= PATCH_INK, owner, BACKGROUND).astype(np.uint8)
