"""`python -m datamodules prepare video`: clips of moving digits as shards."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from datamodules.errors import DataError
from datamodules.processing.fields import DIGITS_FIELD, PATCHES_FIELD
from datamodules.sources.digits import load_scans
from datamodules.sources.drawn import DrawnSamples, DrawOptions, require_source, write_drawn
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes
from datamodules.sources.moving import FRAMES, Clip, draw_clip
from datamodules.sources.splits import Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments

DEFAULT_COUNTS: dict[Split, int] = {"train": 4000, "val": 300, "test": 600}


@dataclass(frozen=True)
class DigitClips(DrawnSamples):
    """Clips of one split.

    Attributes:
        frames: frames of each clip.
    """

    frames: int = FRAMES

    def clip(self, i: int) -> Clip:
        """Clip i."""
        return draw_clip(load_scans(self.split), self.random(i), self.frames)

    def members(self, i: int) -> dict[str, bytes]:
        """A `png` per frame, the sorted digits, the labels of every frame's patches."""
        clip = self.clip(i)
        return {
            **{f"{f:03d}.png": png_bytes(frame) for f, frame in enumerate(clip.frames)},
            DIGITS_FIELD: json_bytes(sorted(clip.digits)),
            PATCHES_FIELD: npy_bytes(clip.patch_labels),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare video`."""
    add_count_arguments(parser, DEFAULT_COUNTS, "clips")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"frames of a clip (default {FRAMES})")
    add_common_arguments(parser)


def prepare(source: str, out: Path, *, frames: int = FRAMES, **options: Unpack[DrawOptions]) -> None:
    """Write video shards.

    Args:
        source: `digits`.
        out: the data set's folder.
        frames: frames of a clip.
        **options: counts of samples, seed, shard size, processes.

    Raises:
        DataError: there is no such source, a clip would have no frame, or `out` holds other data.
    """
    require_source(source, "digits", "video")
    if not 1 <= frames <= 1000:
        raise DataError(f"frames is {frames}, expected 1 to 1000")
    recipe = {"modality": "video", "source": source, "frames": frames}
    write_drawn(out, partial(DigitClips, frames=frames), DEFAULT_COUNTS, recipe, options)
