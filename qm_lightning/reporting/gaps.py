"""How far two methods are apart, and whether seeds alone may explain it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from qm_lightning.reporting.columns import nats
from qm_lightning.reporting.rows import QUALITY, Row

CLEAR = 2.0  # standard errors of the difference from which a gap is called clear


@dataclass(frozen=True)
class Gap:
    """The loss of one row minus that of a better one.

    Attributes:
        size: nats; of the seeds that both have where there are two or more, else of the means.
        error: standard error of ``size``; NaN: one seed, not known.
        shared: seeds that both rows have, if ``size`` was taken within them, else 0.
    """

    size: float
    error: float
    shared: int

    @property
    def decided(self) -> bool | None:
        """Whether the gap is clear; ``None``: one seed, not known."""
        return None if math.isnan(self.error) else self.size > CLEAR * self.error

    @property
    def text(self) -> str:
        """The gap in words."""
        if self.decided is None:
            return f"a gap of {nats(self.size)}, on one seed: chance is not ruled out"
        size = f"{nats(self.size)} \u00b1 {nats(self.error)}"
        size += f" within {self.shared} seeds" if self.shared else ""
        if self.decided:
            return f"a clear gap of {size}, more than {CLEAR:g} standard errors"
        return f"a gap of {size}, less than {CLEAR:g} standard errors: not decided"


def gap_between(best: Row, other: Row) -> Gap:
    """Compare two rows, seed by seed where they share at least two.

    Runs of one seed see the same data in the same order from the same start of the prior, so what a seed brings is
    common to all methods and falls out of the difference.
    """
    first, second = _by_seed(best), _by_seed(other)
    shared = sorted(first.keys() & second.keys())
    if len(shared) > 1:
        differences = [second[seed] - first[seed] for seed in shared]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return Gap(statistics.fmean(differences), error, len(shared))
    size = other.mean(QUALITY) - best.mean(QUALITY)
    variances = [row.spread(QUALITY) ** 2 / max(1, len(row.seen(QUALITY))) for row in (best, other)]
    return Gap(size, math.sqrt(sum(variances)), 0)


def _by_seed(row: Row) -> dict[int, float]:
    """Loss of each run that has one and whose seed is known."""
    losses = {run.seed: run.values.get(QUALITY, math.nan) for run in row.runs if run.seed is not None}
    return {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}
