"""`python -m datamodules prepare image`: digit scenes as shards."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.errors import DataError
from datamodules.processing.fields import DIGITS_FIELD, PATCHES_FIELD
from datamodules.shards.writer import SampleSource
from datamodules.sources.digits import load_scans
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes
from datamodules.sources.scenes import Scene, draw_scene
from datamodules.sources.splits import SPLITS, Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments, write_splits

DEFAULT_COUNTS: dict[Split, int] = {"train": 40000, "val": 500, "test": 1000}


@dataclass(frozen=True)
class DigitScenes:
    """Scenes of one split, drawn when asked for; indexable and picklable.

    Attributes:
        split: whose scans are drawn.
        count: scenes.
        seed: scene i follows from (seed, split, i) alone.
    """

    split: Split
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def scene(self, i: int) -> Scene:
        """Scene i."""
        random = np.random.RandomState([self.seed, SPLITS.index(self.split), i])
        return draw_scene(load_scans(self.split), random)

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Members of scene i: `png`, the sorted digits, the patch labels."""
        scene = self.scene(i)
        return {
            "__key__": f"{self.split}-{i:06d}".encode(),
            "png": png_bytes(scene.canvas),
            DIGITS_FIELD: json_bytes(sorted(scene.digits)),
            PATCHES_FIELD: npy_bytes(scene.patch_labels),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare image`."""
    add_count_arguments(parser, DEFAULT_COUNTS, "scenes")
    add_common_arguments(parser)


def prepare(
    source: str,
    out: Path,
    *,
    train: int = DEFAULT_COUNTS["train"],
    val: int = DEFAULT_COUNTS["val"],
    test: int = DEFAULT_COUNTS["test"],
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 1,
) -> None:
    """Write image shards.

    Args:
        source: `digits`.
        out: the data set's folder.
        train: scenes of the training split.
        val: scenes of the validation split.
        test: scenes of the test split.
        seed: of all draws.
        shard_size: samples per shard.
        workers: writing processes.

    Raises:
        DataError: there is no such source, or `out` holds other data.
    """
    if source != "digits":
        raise DataError(f"there is no image source {source!r}, expected digits")
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    recipe = {"modality": "image", "source": source, "seed": seed, "counts": counts}
    splits: dict[str, SampleSource] = {s: DigitScenes(s, count, seed) for s, count in counts.items()}
    write_splits(out, splits, recipe, shard_size=shard_size, workers=workers)
