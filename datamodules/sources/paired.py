"""`python -m datamodules prepare paired`: digit scenes with captions and questions as shards."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.errors import DataError
from datamodules.processing.fields import CAPTION_FIELD, DIGITS_FIELD, PATCHES_FIELD, QUESTION_FIELD
from datamodules.shards.writer import SampleSource
from datamodules.sources.captions import Words, describe
from datamodules.sources.digits import load_scans
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes
from datamodules.sources.scenes import Scene, draw_scene
from datamodules.sources.splits import SPLITS, Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments, write_splits

DEFAULT_COUNTS: dict[Split, int] = {"train": 10000, "val": 500, "test": 1000}
DIGITS = (2, 3)  # fewest and most digits of a scene
_SALT = 1  # keeps these scenes apart from those of `prepare image`


@dataclass(frozen=True)
class CaptionedScenes:
    """Scenes of one split with their words, drawn when asked for; indexable and picklable.

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

    def scene(self, i: int) -> tuple[Scene, Words]:
        """Scene i, of 2 or 3 digits, and its words."""
        random = np.random.RandomState([self.seed, SPLITS.index(self.split), i, _SALT])
        while True:  # a digit that finds no room is left out of a scene, one in a few hundred times
            scene = draw_scene(load_scans(self.split), random, int(random.randint(DIGITS[0], DIGITS[1] + 1)))
            if len(scene.digits) >= DIGITS[0]:
                return scene, describe(scene, random)

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Members of scene i: picture, caption, question, the sorted digits, the patch labels."""
        scene, words = self.scene(i)
        return {
            "__key__": f"{self.split}-{i:06d}".encode(),
            "png": png_bytes(scene.canvas),
            CAPTION_FIELD: words.caption.encode(),
            QUESTION_FIELD: words.question.encode(),
            DIGITS_FIELD: json_bytes(sorted(scene.digits)),
            PATCHES_FIELD: npy_bytes(scene.patch_labels),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare paired`."""
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
    """Write shards of pictures with captions.

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
        raise DataError(f"there is no paired source {source!r}, expected digits")
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    recipe = {"modality": "paired", "source": source, "seed": seed, "counts": counts}
    splits: dict[str, SampleSource] = {s: CaptionedScenes(s, count, seed) for s, count in counts.items()}
    write_splits(out, splits, recipe, shard_size=shard_size, workers=workers)
