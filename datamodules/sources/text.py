"""`python -m datamodules prepare text`: passages of real source code as shards."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.shards.writer import SampleSource
from datamodules.sources.documents import stdlib_documents
from datamodules.sources.splits import SPLITS, Split
from datamodules.sources.text_tasks import TASKS, Lengths
from datamodules.sources.writing import add_common_arguments, add_count_arguments, write_splits

DEFAULT_COUNTS: dict[Split, int] = {"train": 20000, "val": 500, "test": 1000}
DEFAULT_TASK = "symbols"
_DRAWS = 1000  # tries for a document that gives a sample


@dataclass(frozen=True)
class StdlibSamples:
    """Samples of one split, drawn when asked for; indexable and picklable.

    Attributes:
        split: whose files are read.
        count: samples.
        seed: sample i follows from (seed, split, i) and the files alone.
        task: name in `TASKS`.
        lengths: of context and target.
    """

    split: Split
    count: int
    seed: int
    task: str
    lengths: Lengths

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Members of sample i: `txt` and, if the task has targets, `target.txt`."""
        random = np.random.RandomState([self.seed, SPLITS.index(self.split), i])
        documents = stdlib_documents(self.split)
        for _ in range(_DRAWS):
            at = np.searchsorted(_cumulative(self.split), random.random_sample(), side="right")
            pair = TASKS[self.task](documents[int(at)], random, self.lengths)
            if pair is not None:
                text, target = pair
                sample = {"__key__": f"{self.split}-{i:06d}".encode(), "txt": text}
                return sample if target is None else sample | {"target.txt": target}
        raise DataError(
            f"found no {self.task} sample of {self.lengths.context} bytes in {_DRAWS} draws from the "
            f"{self.split} files; expected shorter contexts or targets"
        )


@cache
def _cumulative(split: Split) -> NDArray[np.float64]:
    """Where each document ends on [0,1): a document is drawn as often as it is long."""
    ends = np.cumsum([float(d.size) for d in stdlib_documents(split)])
    shares: NDArray[np.float64] = ends / ends[-1]
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare text`."""
    add_count_arguments(parser, DEFAULT_COUNTS, "samples")
    parser.add_argument("--task", choices=sorted(TASKS), default=DEFAULT_TASK, help="what the target is")
    parser.add_argument("--context_bytes", type=int, default=256)
    parser.add_argument("--target_bytes", type=int, default=64, help="longer targets are cut")
    add_common_arguments(parser)


def prepare(
    source: str,
    out: Path,
    *,
    task: str = DEFAULT_TASK,
    context_bytes: int = 256,
    target_bytes: int = 64,
    train: int = DEFAULT_COUNTS["train"],
    val: int = DEFAULT_COUNTS["val"],
    test: int = DEFAULT_COUNTS["test"],
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 1,
) -> None:
    """Write text shards.

    Args:
        source: `stdlib`, the Python standard library's own source, split by file.
        out: the data set's folder.
        task: name in `TASKS`.
        context_bytes: length of a context.
        target_bytes: longest target.
        train: samples of the training split.
        val: samples of the validation split.
        test: samples of the test split.
        seed: of all draws.
        shard_size: samples per shard.
        workers: writing processes.

    Raises:
        DataError: there is no such source, a length is below 1, or `out` holds other data.
    """
    if source != "stdlib":
        raise DataError(f"there is no text source {source!r}, expected stdlib")
    if min(context_bytes, target_bytes) < 1:
        raise DataError(
            f"context_bytes is {context_bytes} and target_bytes {target_bytes}, expected 1 or more"
        )
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    lengths = Lengths(context_bytes, target_bytes)
    splits: dict[str, SampleSource] = {
        s: StdlibSamples(s, count, seed, task, lengths) for s, count in counts.items()
    }
    recipe = {
        "modality": "text",
        "source": source,
        "task": task,
        "context_bytes": context_bytes,
        "target_bytes": target_bytes,
        "seed": seed,
        "counts": counts,
    }
    write_splits(out, splits, recipe, shard_size=shard_size, workers=workers)
