"""Whose turn it is in a mixture: a pure function of the seed and the number of the draw.

Weights become whole numbers of draws in a cycle, which hold in every cycle exactly; each cycle is shuffled
anew. One integer still says where a run is. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.hashing import Int, hash64, permute

LONGEST = 10_000  # draws of a cycle
_TABLE = 4  # tag of keys


class MixtureTurns:
    """The source of every draw.

    Args:
        weights: how often each source is drawn, relative to each other; positive, as whole or decimal numbers.
        seed: of the order inside a cycle; two cycles differ.

    Raises:
        DataError: a weight that is not positive, or weights that only a very long cycle would hold exactly.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
            raise DataError(f"mixture weights are {list(weights)}, expected a positive number for each part")
        exact = [Fraction(str(w)) for w in weights]
        shared = math.lcm(*(w.denominator for w in exact))
        whole = [int(w * shared) for w in exact]
        self.counts = tuple(w // math.gcd(*whole) for w in whole)
        if (cycle := sum(self.counts)) > LONGEST:
            raise DataError(
                f"mixture weights {list(weights)} hold exactly only over {cycle} batches, expected {LONGEST} at "
                "most; use rounder numbers, such as 2, 1, 1"
            )
        self._seed = seed
        self._shuffled = lru_cache(4)(self._cycle)

    def __len__(self) -> int:
        """Draws of a cycle."""
        return sum(self.counts)

    def __call__(self, draw: int) -> int:
        """Number of the source that draw `draw` takes from, counted from the start of the run."""
        cycle, place = divmod(draw, len(self))
        return int(self._shuffled(cycle)[place])

    def _cycle(self, number: int) -> Int:
        table = np.repeat(np.arange(len(self.counts)), self.counts)
        size = np.full(len(table), len(table))
        order = permute(np.arange(len(table)), size, hash64(_TABLE, self._seed, number))
        shuffled: Int = table[order]
        return shuffled
