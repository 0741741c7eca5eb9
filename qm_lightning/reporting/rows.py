"""Runs that differ in their seed only, put together: means and spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qm_lightning.reporting.runs import Run, merger_name

QUALITY = "quality/nats"
KEPT = "tokens/kept_mean"
COMPRESSION = "tokens/compression"


@dataclass(frozen=True)
class Row:
    """One method at one compression.

    Attributes:
        method: as in ``Run``.
        target: the compression asked for, or ``None``.
        runs: one per seed.
    """

    method: str
    target: float | None
    runs: tuple[Run, ...]

    @property
    def merger(self) -> str:
        """Class name of the merger."""
        return merger_name(self.runs[0])

    @property
    def full(self) -> bool:
        """Whether nothing is merged: the reference that reads all tokens."""
        return self.merger == "NoMerge"

    def seen(self, name: str) -> list[float]:
        """The figure's finite values, one per run that has it."""
        values = (run.values.get(name, math.nan) for run in self.runs)
        return [value for value in values if math.isfinite(value)]

    def mean(self, name: str) -> float:
        """Mean over seeds; NaN if no run has the figure."""
        return statistics.fmean(self.seen(name)) if self.seen(name) else math.nan

    def spread(self, name: str) -> float:
        """Sample standard deviation over seeds; NaN with fewer than two."""
        return statistics.stdev(self.seen(name)) if len(self.seen(name)) > 1 else math.nan

    @property
    def target_text(self) -> str:
        """The compression asked for, as printed."""
        return "-" if self.target is None else f"{self.target:g}x"

    @property
    def name(self) -> str:
        """Method and compression: ``ToMe 4x``, ``NoMerge``."""
        return self.method if self.target is None else f"{self.method} {self.target_text}"


def put_together(runs: Sequence[Run]) -> list[Row]:
    """Rows of one experiment: by compression (all tokens first), within it by quality, best first."""
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, None if merger_name(run) == "NoMerge" else run.target), []).append(run)
    rows = [Row(method, target, tuple(members)) for (method, target), members in groups.items()]

    def order(row: Row) -> tuple[bool, float, float, str]:
        quality = row.mean(QUALITY)
        return not row.full, row.target or 0.0, math.inf if math.isnan(quality) else quality, row.method

    return sorted(rows, key=order)


def at_target(rows: Sequence[Row], target: float | None) -> list[Row]:
    """The merging rows of one compression that have a quality, best first."""
    return [r for r in rows if not r.full and r.target == target and not math.isnan(r.mean(QUALITY))]


def targets(rows: Sequence[Row]) -> list[float | None]:
    """Compressions of the merging rows, ascending; ``None`` (not known) first."""
    return sorted({row.target for row in rows if not row.full}, key=lambda target: target or 0.0)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (cost, loss) that no other one beats in one and equals or beats in the other.

    Args:
        points: pairs, lower is better in both.

    Returns:
        Indices, by ascending cost; of equal points all.
    """
    front = [
        i
        for i, (cost, loss) in enumerate(points)
        if not any(c <= cost and q <= loss and (c < cost or q < loss) for c, q in points)
    ]
    return sorted(front, key=lambda i: points[i])
