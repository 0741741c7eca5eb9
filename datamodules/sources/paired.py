"""`python -m datamodules prepare paired`: digit scenes with captions and questions as shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Unpack

from datamodules.processing.fields import CAPTION_FIELD, DIGITS_FIELD, PATCHES_FIELD, QUESTION_FIELD
from datamodules.sources.captions import Words, describe
from datamodules.sources.digits import load_scans
from datamodules.sources.drawn import DrawnSamples, DrawOptions, require_source, write_drawn
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes
from datamodules.sources.scenes import Scene, draw_scene
from datamodules.sources.splits import Split
from datamodules.sources.writing import add_common_arguments, add_count_arguments

DEFAULT_COUNTS: dict[Split, int] = {"train": 10000, "val": 500, "test": 1000}
DIGITS = (2, 3)  # fewest and most digits of a scene


class CaptionedScenes(DrawnSamples):
    """Scenes of one split with their words."""

    salt = (1,)  # keeps these scenes apart from those of `prepare image`

    def scene(self, i: int) -> tuple[Scene, Words]:
        """Scene i, of 2 or 3 digits, and its words."""
        random = self.random(i)
        while True:  # a digit that finds no room is left out of a scene, one in a few hundred times
            scene = draw_scene(load_scans(self.split), random, int(random.randint(DIGITS[0], DIGITS[1] + 1)))
            if len(scene.digits) >= DIGITS[0]:
                return scene, describe(scene, random)

    def members(self, i: int) -> dict[str, bytes]:
        """Picture, caption, question, the sorted digits, the patch labels."""
        scene, words = self.scene(i)
        return {
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


def prepare(source: str, out: Path, **options: Unpack[DrawOptions]) -> None:
    """Write shards of pictures with captions.

    Args:
        source: `digits`.
        out: the data set's folder.
        **options: counts of samples, seed, shard size, processes.

    Raises:
        DataError: there is no such source, or `out` holds other data.
    """
    require_source(source, "digits", "paired")
    recipe = {"modality": "paired", "source": source}
    write_drawn(out, CaptionedScenes, DEFAULT_COUNTS, recipe, options)
