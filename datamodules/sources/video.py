"""`python -m datamodules prepare video`: clips of moving digits as shards."""

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
from datamodules.sources.moving import FRAMES, Clip, draw_clip
from datamodules.sources.splits import SPLITS, Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments, write_splits

DEFAULT_COUNTS: dict[Split, int] = {"train": 4000, "val": 300, "test": 600}


@dataclass(frozen=True)
class DigitClips:
    """Clips of one split, drawn when asked for; indexable and picklable.

    Attributes:
        split: whose scans are drawn.
        count: clips.
        seed: clip i follows from (seed, split, i) alone.
        frames: frames of each clip.
    """

    split: Split
    count: int
    seed: int
    frames: int = FRAMES

    def __len__(self) -> int:
        return self.count

    def clip(self, i: int) -> Clip:
        """Clip i."""
        random = np.random.RandomState([self.seed, SPLITS.index(self.split), i])
        return draw_clip(load_scans(self.split), random, self.frames)

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Members of clip i: a `png` per frame, the sorted digits, the labels of every frame's patches."""
        clip = self.clip(i)
        return {
            "__key__": f"{self.split}-{i:06d}".encode(),
            **{f"{f:03d}.png": png_bytes(frame) for f, frame in enumerate(clip.frames)},
            DIGITS_FIELD: json_bytes(sorted(clip.digits)),
            PATCHES_FIELD: npy_bytes(clip.patch_labels),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare video`."""
    add_count_arguments(parser, DEFAULT_COUNTS, "clips")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames of a clip (default {FRAMES})")
    add_common_arguments(parser)


def prepare(
    source: str,
    out: Path,
    *,
    train: int = DEFAULT_COUNTS["train"],
    val: int = DEFAULT_COUNTS["val"],
    test: int = DEFAULT_COUNTS["test"],
    frames: int = FRAMES,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 1,
) -> None:
    """Write video shards.

    Args:
        source: `digits`.
        out: the data set's folder.
        train: clips of the training split.
        val: clips of the validation split.
        test: clips of the test split.
        frames: frames of a clip.
        seed: of all draws.
        shard_size: samples per shard.
        workers: writing processes.

    Raises:
        DataError: there is no such source, a clip would have no frame, or `out` holds other data.
    """
    if source != "digits":
        raise DataError(f"there is no video source {source!r}, expected digits")
    if not 1 <= frames <= 1000:
        raise DataError(f"frames is {frames}, expected 1 to 1000")
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    recipe = {"modality": "video", "source": source, "frames": frames, "seed": seed, "counts": counts}
    splits: dict[str, SampleSource] = {s: DigitClips(s, n, seed, frames) for s, n in counts.items()}
    write_splits(out, splits, recipe, shard_size=shard_size, workers=workers)
