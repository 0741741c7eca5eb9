"""The order of an epoch: a pure function of (seed, epoch) from position to (shard, sample).

Nothing in it depends on ranks, workers or the batch size, so all of these may change at a checkpoint, which
holds one integer. Construction (ours; lanes are what other streams call canonical nodes):

1. Every shard is cut into slices of consecutive samples; the slices are shuffled and laid end to end on an
   axis.
2. Lane l owns the axis from lN/C to (l+1)N/C; a shard may straddle lanes, so their sizes differ by one at
   most.
3. Inside a lane, windows of consecutive axis places are permuted: a shuffle buffer that can be addressed.
4. Positions are dealt to lanes in units. When C is a multiple of ranks x workers and a unit is a rank's
   batch, every worker reads lanes of its own, near-sequentially; with any other numbers the order is the same
   and only the reading is less local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.hashing import Int, hash64, permute

Order = Callable[[Int], tuple[Int, Int]]
"""Positions, int64 [n] -> (shard, sample in the shard), int64 [n] each."""

_SLICES, _WINDOWS = 1, 2  # tags that keep the two kinds of keys apart


@dataclass(frozen=True)
class OrderSettings:
    """What an order depends on beside the shards; part of every checkpoint.

    Attributes:
        seed: in [0, 2**63).
        shuffle: False = the shards' own order in every epoch.
        window: places that are shuffled among each other; 0 = the whole lane (a full shuffle when there is
            one lane).
        slice_len: samples that stay neighbours before the windows are shuffled; 0 = whole shards. Ignored
            when one window spans everything.
        lanes: sequential streams that the epoch is dealt from.
        unit: consecutive positions that come from one lane.
        bucket: positions that are sorted by stored length among each other, in units of `unit`; 0 = off.
    """

    seed: int = 0
    shuffle: bool = True
    window: int = 16384
    slice_len: int = 256
    lanes: int = 1
    unit: int = 1
    bucket: int = 0

    def __post_init__(self) -> None:
        least = {"seed": 0, "window": 0, "slice_len": 0, "lanes": 1, "unit": 1, "bucket": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not minimum <= value < 2**63:
                raise DataError(f"order setting {name} is {value}, expected an integer of at least {minimum}")
        if self.bucket % self.unit:
            raise DataError(f"bucket is {self.bucket}, expected a multiple of unit = {self.unit}")

    def state(self) -> dict[str, Any]:
        """Plain types for a checkpoint."""
        return asdict(self)


class EpochOrder:
    """The order of one epoch, by the construction above.

    Memory: 24 bytes per slice. Calling it costs the same at any dataset size.

    Args:
        counts: samples per shard.
        settings: see `OrderSettings`; `bucket` is not applied here but by `datamodules.shards.buckets`.
        epoch: number of the epoch, from 0.

    Raises:
        DataError: there is no sample.
    """

    def __init__(self, counts: Sequence[int] | Int, settings: OrderSettings, epoch: int = 0) -> None:
        self._settings, self._epoch = settings, epoch
        per_shard = np.asarray(counts, np.int64)
        self.total = int(per_shard.sum())
        if self.total == 0:
            raise DataError(
                "found no sample in the shards, expected at least one: check the directory and its index"
            )
        lanes, unit = settings.lanes, settings.unit
        self._slice_shard, self._slice_start, sizes = self._cut(per_shard)
        self._axis = np.concatenate([[0], np.cumsum(sizes)])
        self._lane_start = np.arange(lanes + 1, dtype=np.int64) * self.total // lanes
        self._full_units = self.total // lanes // unit
        left_over = np.diff(self._lane_start) - self._full_units * unit
        self._tail_start = np.concatenate([[0], np.cumsum(left_over)])

    def _cut(self, counts: Int) -> tuple[Int, Int, Int]:
        """Shard, first sample and length of every slice, shuffled."""
        s = self._settings
        one_window = s.lanes == 1 and (s.window == 0 or s.window >= self.total)
        if not s.shuffle or one_window:  # the windows do all the shuffling
            return np.arange(len(counts)), np.zeros_like(counts), counts
        length = s.slice_len or max(1, int(counts.max()))
        pieces = -(-counts // length)
        shard = np.repeat(np.arange(len(counts)), pieces)
        first = np.concatenate([[0], np.cumsum(pieces)])[:-1]
        start = (np.arange(len(shard)) - first[shard]) * length
        size = np.minimum(length, counts[shard] - start)
        n = len(shard)
        key = hash64(_SLICES, s.seed, self._epoch)
        shuffled = permute(np.arange(n, dtype=np.int64), np.full(n, n, np.int64), key)
        return shard[shuffled], start[shuffled], size[shuffled]

    def __call__(self, position: Int) -> tuple[Int, Int]:
        """Find samples.

        Args:
            position: int64 [n], each in [0, total).

        Returns:
            (shard, sample in the shard), int64 [n] each.
        """
        lane, place = self._deal(np.asarray(position, np.int64))
        x = self._lane_start[lane] + (self._shuffle(lane, place) if self._settings.shuffle else place)
        piece = np.searchsorted(self._axis, x, side="right") - 1
        return self._slice_shard[piece], self._slice_start[piece] + x - self._axis[piece]

    def _deal(self, p: Int) -> tuple[Int, Int]:
        """Lane, and place inside the lane, of each position; the lanes' left-over places come last."""
        lanes, unit = self._settings.lanes, self._settings.unit
        if lanes == 1:
            return np.zeros_like(p), p
        body = lanes * self._full_units * unit
        turn, within = np.divmod(p, unit)
        tail_lane = np.clip(np.searchsorted(self._tail_start, p - body, side="right") - 1, 0, lanes - 1)
        tail_place = self._full_units * unit + p - body - self._tail_start[tail_lane]
        in_body = p < body
        lane = np.where(in_body, turn % lanes, tail_lane)
        return lane, np.where(in_body, turn // lanes * unit + within, tail_place)

    def _shuffle(self, lane: Int, place: Int) -> Int:
        size = self._lane_start[lane + 1] - self._lane_start[lane]
        window = self._settings.window or self.total
        number, within = np.divmod(place, window)
        key = hash64(_WINDOWS, self._settings.seed, self._epoch, lane, number)
        return number * window + permute(within, np.minimum(window, size - number * window), key)
