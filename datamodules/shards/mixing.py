"""The order of a mixture of sources: still a pure function of (seed, epoch) and the position.

A table of draws with the wanted proportions, shuffled anew for each epoch, is read round and round; a source
that runs out begins another pass, in another order. One integer still says where a run is. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.hashing import Int, hash64, permute
from datamodules.shards.order import EpochOrder, OrderSettings

_TABLE, _SOURCE = 4, 5  # tags of keys
_PASSES = 4  # orders of one source's passes that are kept


class Draw(NamedTuple):
    """What a mixture's positions stand for; int64 [n] each.

    Attributes:
        source: number of the source.
        turn: pass through the source, counted from the start of the run.
        position: position in that pass's order.
    """

    source: Int
    turn: Int
    position: Int


class MixtureOrder:
    """The order of one epoch of a mixture.

    The epoch has a whole number of tables, so every epoch draws equally often from each source and each
    source goes on where the epoch before left it.

    Args:
        sources: samples per shard, for each source.
        weights: how often each source is drawn, relative to each other, positive.
        settings: order inside the sources; its seed also shuffles the table.
        epoch: number of the epoch.
        draws: length of the table; proportions are multiples of 1/draws.
        samples: wished length of the epoch, rounded down to whole tables (at least one); `None`: that of all
            sources together.

    Raises:
        DataError: no weight per source, a weight that is not positive, or one too small for the table.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        weights: Sequence[float],
        settings: OrderSettings,
        epoch: int = 0,
        *,
        draws: int = 1000,
        samples: int | None = None,
    ) -> None:
        if len(weights) != len(sources) or not sources or min(weights) <= 0:
            raise DataError(f"mixture weights are {list(weights)}, expected {len(sources)} positive numbers")
        self._sources, self._settings, self._epoch = sources, settings, epoch
        self._sizes = np.array([sum(counts) for counts in sources], np.int64)
        self._first_shard = np.concatenate([[0], np.cumsum([len(counts) for counts in sources])])[:-1]
        self._drawn = _apportion(weights, draws)
        if (rare := int(self._drawn.min())) < 1:
            raise DataError(
                f"a weight in {list(weights)} gets {rare} of {draws} draws, expected at least 1: raise draws"
            )
        wished = int(self._sizes.sum()) if samples is None else samples
        self._tables = max(1, wished // draws)
        self.total = self._tables * draws
        self._table = np.repeat(np.arange(len(sources)), self._drawn)
        if settings.shuffle:
            key = hash64(_TABLE, settings.seed, epoch)
            self._table = self._table[permute(np.arange(draws), np.full(draws, draws), key)]
        same = self._table[:, None] == np.arange(len(sources))
        self._rank = np.take_along_axis(np.cumsum(same, axis=0), self._table[:, None], axis=1)[:, 0] - 1
        self._pass = lru_cache(_PASSES * len(sources))(self._order_of)

    def draw(self, position: Int) -> Draw:
        """What to take from which source.

        Args:
            position: int64 [n], each in [0, total).
        """
        round_, entry = np.divmod(position, len(self._table))
        source = self._table[entry]
        earlier = (self._epoch * self._tables + round_) * self._drawn[source]
        turn, place = np.divmod(earlier + self._rank[entry], self._sizes[source])
        return Draw(source, turn, place)

    def __call__(self, position: Int) -> tuple[Int, Int]:
        """Find samples.

        Args:
            position: int64 [n], each in [0, total).

        Returns:
            (shard, sample in the shard), int64 [n] each; shards of all sources are numbered through.
        """
        drawn = self.draw(position)
        shard, sample = np.empty_like(position), np.empty_like(position)
        for s, turn in set(zip(drawn.source.tolist(), drawn.turn.tolist(), strict=True)):
            at = (drawn.source == s) & (drawn.turn == turn)
            shards, sample[at] = self._pass(s, turn)(drawn.position[at])
            shard[at] = shards + self._first_shard[s]
        return shard, sample

    def _order_of(self, source: int, turn: int) -> EpochOrder:
        seed = int(hash64(_SOURCE, self._settings.seed, source)[0] >> np.uint64(1))
        return EpochOrder(self._sources[source], replace(self._settings, seed=seed), turn)


def _apportion(weights: Sequence[float], draws: int) -> Int:
    """Whole numbers that sum to `draws`, in proportion to the weights (largest remainders)."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * draws
    counts: Int = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: draws - int(counts.sum())]
    counts[most] += 1
    return counts
