"""Batches of samples of similar length, still as a pure function of the position.

Inside each bucket of consecutive positions the samples are sorted by their stored length, cut into units, and
the units are shuffled. Lengths come from the shards' indexes, so neither history nor the number of ranks
enters. Ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from datamodules.shards.hashing import Int, hash64, permute
from datamodules.shards.order import EpochOrder, OrderSettings

_BUCKETS = 3  # tag of this kind of key
_KEPT = 4  # sorted buckets in memory


class LengthBuckets:
    """An epoch's order with neighbours of similar length.

    Args:
        order: the order to rearrange.
        lengths: (shard, sample) -> stored bytes, int64 [n] each.
        settings: `bucket` is the number of positions that are sorted together, a multiple of `unit`, the
            number of neighbours of similar length (a rank's batch).
        epoch: number of the epoch.
    """

    def __init__(
        self, order: EpochOrder, lengths: Callable[[Int, Int], Int], settings: OrderSettings, epoch: int
    ) -> None:
        self._order, self._lengths, self._settings, self._epoch = order, lengths, settings, epoch
        self._sorted: dict[int, tuple[Int, Int]] = {}

    def __call__(self, position: Int) -> tuple[Int, Int]:
        """Find samples.

        Args:
            position: int64 [n], each in [0, total).

        Returns:
            (shard, sample in the shard), int64 [n] each.
        """
        number, within = np.divmod(position, self._settings.bucket)
        shard, sample = np.empty_like(position), np.empty_like(position)
        for bucket in np.unique(number).tolist():
            at = number == bucket
            shards, samples = self._bucket(bucket)
            shard[at], sample[at] = shards[within[at]], samples[within[at]]
        return shard, sample

    def _bucket(self, number: int) -> tuple[Int, Int]:
        if number not in self._sorted:
            if len(self._sorted) >= _KEPT:
                self._sorted.pop(next(iter(self._sorted)))
            self._sorted[number] = self._sort(number)
        return self._sorted[number]

    def _sort(self, number: int) -> tuple[Int, Int]:
        size, unit = self._settings.bucket, self._settings.unit
        shard, sample = self._order(np.arange(number * size, min((number + 1) * size, self._order.total)))
        by_length = np.lexsort((sample, shard, self._lengths(shard, sample)))
        full = len(by_length) // unit
        turn = np.arange(full, dtype=np.int64)
        if self._settings.shuffle and full:
            key = hash64(_BUCKETS, self._settings.seed, self._epoch, number)
            turn = permute(turn, np.full(full, full, np.int64), key)
        units = by_length[: full * unit].reshape(full, unit)[turn].reshape(-1)
        order = np.concatenate([units, by_length[full * unit :]])  # a short unit can only come last
        return shard[order], sample[order]
