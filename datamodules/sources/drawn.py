"""Sources that draw their samples: sample i of a split follows from (seed, split, i) alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.writer import SampleSource
from datamodules.sources.splits import SPLITS, Split
from datamodules.sources.writing import write_splits


@dataclass(frozen=True)
class DrawnSamples(ABC):
    """Samples of one split, drawn when asked for; indexable and picklable.

    Attributes:
        split: whose scans or files are drawn from.
        count: samples.
        seed: of all draws.
    """

    split: Split
    count: int
    seed: int
    salt: ClassVar[tuple[int, ...]] = ()
    """Keeps the draws of two sources apart that have a seed and a split in common."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Key and members of sample i."""
        return {"__key__": f"{self.split}-{i:06d}".encode(), **self.members(i)}

    @abstractmethod
    def members(self, i: int) -> dict[str, bytes]:
        """Fields of sample i by extension."""

    def random(self, i: int) -> np.random.RandomState:
        """The only source of chance of sample i."""
        return np.random.RandomState([self.seed, SPLITS.index(self.split), i, *self.salt])


class DrawOptions(TypedDict, total=False):
    """Options of ``prepare`` that all these sources share; what is left out has its default.

    Attributes:
        train: samples of the training split.
        val: samples of the validation split.
        test: samples of the test split.
        seed: of all draws; 0.
        shard_size: samples per shard; 1000.
        workers: writing processes; 1.
    """

    train: int
    val: int
    test: int
    seed: int
    shard_size: int
    workers: int


def write_drawn(
    out: Path,
    samples: Callable[[Split, int, int], SampleSource],
    counts: Mapping[Split, int],
    recipe: Mapping[str, Any],
    options: DrawOptions,
) -> None:
    """Write the splits of a source that draws its samples.

    Args:
        out: the data set's folder.
        samples: makes a split's samples from (split, count, seed).
        counts: samples by split where ``options`` has none.
        recipe: what else the samples follow from, the modality among it.
        options: of the user.

    Raises:
        DataError: ``out`` holds other data.
    """
    seed = options.get("seed", 0)
    wanted = {split: options.get(split, count) for split, count in counts.items()}
    splits: dict[str, SampleSource] = {s: samples(s, count, seed) for s, count in wanted.items()}
    sizes = {"shard_size": options.get("shard_size", 1000), "workers": options.get("workers", 1)}
    write_splits(out, splits, {**recipe, "seed": seed, "counts": wanted}, **sizes)


def require_source(source: str, known: str, modality: str) -> None:
    """Refuse the name of a source that does not ship.

    Raises:
        DataError: it is not the one of this modality.
    """
    if source != known:
        raise DataError(f"there is no {modality} source {source!r}, expected {known}")
