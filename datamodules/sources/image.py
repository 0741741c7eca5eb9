"""`python -m datamodules prepare image`: digit scenes as shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Unpack

from datamodules.processing.fields import DIGITS_FIELD, PATCHES_FIELD
from datamodules.sources.digits import load_scans
from datamodules.sources.drawn import DrawnSamples, DrawOptions, require_source, write_drawn
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes
from datamodules.sources.scenes import Scene, draw_scene
from datamodules.sources.splits import Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments

DEFAULT_COUNTS: dict[Split, int] = {"train": 40000, "val": 500, "test": 1000}


class DigitScenes(DrawnSamples):
    """Scenes of one split."""

    def scene(self, i: int) -> Scene:
        """Scene i."""
        return draw_scene(load_scans(self.split), self.random(i))

    def members(self, i: int) -> dict[str, bytes]:
        """`png`, the sorted digits, the patch labels."""
        scene = self.scene(i)
        return {
            "png": png_bytes(scene.canvas),
            DIGITS_FIELD: json_bytes(sorted(scene.digits)),
            PATCHES_FIELD: npy_bytes(scene.patch_labels),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare image`."""
    add_count_arguments(parser, DEFAULT_COUNTS, "scenes")
    add_common_arguments(parser)


def prepare(source: str, out: Path, **options: Unpack[DrawOptions]) -> None:
    """Write image shards.

    Args:
        source: `digits`.
        out: the data set's folder.
        **options: counts of samples, seed, shard size, processes.

    Raises:
        DataError: there is no such source, or `out` holds other data.
    """
    require_source(source, "digits", "image")
    recipe = {"modality": "image", "source": source}
    write_drawn(out, DigitScenes, DEFAULT_COUNTS, recipe, options)
