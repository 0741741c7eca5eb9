"""Who trains which positions: ranks, batches and tail of an epoch. The same arithmetic on every rank.

An *absolute* position is epoch * N + position, so that batches may run over the end of an epoch (tail
`carry`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.hashing import Int

Tail = Literal["pad", "drop", "carry"]


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        epoch: epoch of the stream.
        consumed: samples of that epoch that are done, over all ranks.
    """

    epoch: int
    consumed: int


class Share(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        positions: int64 [<= batch], absolute positions; fewer than a batch only at the end of an epoch.
        end: absolute position after the global batch.
        weight: factor on this rank's mean that makes the mean over ranks the mean over samples.
    """

    positions: Int
    end: int
    weight: float


@dataclass(frozen=True)
class Geometry:
    """Ranks, batch size and tail over an epoch of `total` samples.

    Attributes:
        total: N, samples in an epoch.
        batch: samples of one batch on one rank.
        rank: this process.
        world: number of processes.
        tail: what happens to the last, partial global batch: `pad` deals it over all ranks, each batch padded
            to full shape and masked; `drop` leaves it out; `carry` fills it from the next epoch.
    """

    total: int
    batch: int
    rank: int = 0
    world: int = 1
    tail: Tail = "pad"

    def __post_init__(self) -> None:
        if self.tail not in ("pad", "drop", "carry"):
            raise DataError(f'tail is {self.tail!r}, expected "pad", "drop" or "carry"')
        if self.batch < 1:
            raise DataError(f"batch_size is {self.batch}, expected at least 1")
        if not 0 <= self.rank < self.world:
            raise DataError(f"rank is {self.rank}, expected a number in [0, world size = {self.world})")
        if self.tail == "drop" and self.total < self.step:
            raise DataError(
                f'tail="drop" leaves no batch: {self.total} samples, but one on {self.world} rank(s) takes '
                f'{self.step}; use tail="pad" or a smaller batch_size'
            )

    @property
    def step(self) -> int:
        """Samples of one batch over all ranks."""
        return self.batch * self.world

    @property
    def batches(self) -> int:
        """Batches of a full epoch, on every rank."""
        return max(1, self.total // self.step) if self.tail == "carry" else self.remaining(0)

    def remaining(self, consumed: int) -> int:
        """Batches from a position on; with `carry` there is no end, so those of a full epoch."""
        if self.tail == "carry":
            return self.batches
        left = max(0, self.total - consumed)
        return left // self.step if self.tail == "drop" else -(-left // self.step)

    def share(self, start: Progress, number: int) -> Share:
        """This rank's part of a global batch.

        Args:
            start: where the count of batches begins.
            number: global batch, counted from there.

        Returns:
            Its positions; with an empty array where the tail has fewer samples than ranks.
        """
        base = start.epoch * self.total + start.consumed + number * self.step
        stop = base + self.step
        if self.tail != "carry":
            stop = min(stop, (start.epoch + 1) * self.total)
        if (size := stop - base) == self.step:
            first = base + self.rank * self.batch
            return Share(np.arange(first, first + self.batch, dtype=np.int64), stop, 1.0)
        dealt = np.arange(base + self.rank, stop, self.world, dtype=np.int64)
        return Share(dealt, stop, len(dealt) * self.world / size)

    def progress(self, start: Progress, end: int) -> Progress:
        """Progress at an absolute position."""
        if self.tail == "carry":
            return Progress(*divmod(end, self.total))
        return Progress(start.epoch, end - start.epoch * self.total)
