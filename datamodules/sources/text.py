"""`python -m datamodules prepare text`: passages of real source code as shards."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.sources.documents import stdlib_documents
from datamodules.sources.drawn import DrawnSamples, DrawOptions, require_source, write_drawn
from datamodules.sources.splits import Split
from datamodules.sources.text_tasks import TASKS, Lengths
from datamodules.sources.writing import add_common_arguments, add_count_arguments

DEFAULT_COUNTS: dict[Split, int] = {"train": 20000, "val": 500, "test": 1000}
DEFAULT_TASK = "symbols"
_DRAWS = 1000  # tries for a document that gives a sample


@dataclass(frozen=True)
class StdlibSamples(DrawnSamples):
    """Passages of one split; they follow from the files too.

    Attributes:
        task: name in `TASKS`.
        lengths: of context and target.
    """

    task: str
    lengths: Lengths

    def members(self, i: int) -> dict[str, bytes]:
        """`txt` and, if the task has targets, `target.txt`."""
        random = self.random(i)
        documents = stdlib_documents(self.split)
        for _ in range(_DRAWS):
            at = np.searchsorted(_cumulative(self.split), random.random_sample(), side="right")
            pair = TASKS[self.task](documents[int(at)], random, self.lengths)
            if pair is not None:
                text, target = pair
                return {"txt": text} if target is None else {"txt": text, "target.txt": target}
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
    **options: Unpack[DrawOptions],
) -> None:
    """Write text shards.

    Args:
        source: `stdlib`, the Python standard library's own source, split by file.
        out: the data set's folder.
        task: name in `TASKS`.
        context_bytes: length of a context.
        target_bytes: longest target.
        **options: counts of samples, seed, shard size, processes.

    Raises:
        DataError: there is no such source, a length is below 1, or `out` holds other data.
    """
    require_source(source, "stdlib", "text")
    if min(context_bytes, target_bytes) < 1:
        raise DataError(
            f"context_bytes is {context_bytes} and target_bytes {target_bytes}, expected 1 or more"
        )
    samples = partial(StdlibSamples, task=task, lengths=Lengths(context_bytes, target_bytes))
    recipe = {
        "modality": "text",
        "source": source,
        "task": task,
        "context_bytes": context_bytes,
        "target_bytes": target_bytes,
    }
    write_drawn(out, samples, DEFAULT_COUNTS, recipe, options)
