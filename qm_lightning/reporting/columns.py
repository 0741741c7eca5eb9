"""The columns of the table, and how their figures are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qm_lightning.reporting.rows import COMPRESSION, KEPT, QUALITY, Row

MIB = 2**20
ABSENT = "-"


def decimals(value: float, digits: int = 3) -> int:
    """Decimals with which a number shows so many significant digits."""
    return 0 if value == 0.0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))


def number(value: float) -> str:
    """Three significant digits without exponent: 0.0231, 1.25, 131, 2460."""
    return f"{value:.{decimals(value)}f}" if math.isfinite(value) else ABSENT


def nats(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}" if math.isfinite(value) else ABSENT


def count(value: float) -> str:
    """Tokens: 25, 27.5, 108; one decimal where it says something."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: name of the figure.
        title: heading.
        explanation: one sentence for the page.
        factor: what the figure is multiplied by before it is printed.
        places: decimals; ``None``: as many as three significant digits need.
        best: ``"low"`` or ``"high"`` where the best of a compression is marked.
        spread: whether the spread over seeds is printed.
        unit: printed behind the figure.
    """

    key: str
    title: str
    explanation: str
    factor: float = 1.0
    places: int | None = None
    best: str | None = None
    spread: bool = True
    unit: str = ""


BITS = Column(
    "quality/bits",
    "bits / token",
    "the same in bits (bits per byte where targets are bytes)",
    places=3,
    best="low",
)
COLUMNS = (
    Column(
        QUALITY,
        "nats / token",
        "mean negative log-likelihood per target token; lower is better",
        places=3,
        best="low",
    ),
    BITS,
    Column(
        "quality/exact", "exact %", "share of samples whose whole target is predicted right", 100, 1, "high"
    ),
    Column(
        "quality/top1",
        "top-1 %",
        "share of target tokens predicted right, given those before",
        100,
        1,
        "high",
    ),
    Column(
        "labels/f1",
        "labels F1",
        "labels that one-shot sampling finds against the true ones: recall and precision in one, mean over samples",
        places=3,
        best="high",
    ),
    Column("labels/recall", "recall", "share of the true labels that are found", places=3),
    Column("labels/precision", "precision", "share of the predicted labels that are true", places=3),
    Column("labels/exact", "sets %", "share of samples whose whole set of labels is right", 100, 1, "high"),
    Column(
        KEPT, "tokens kept", "merged tokens per sample: mean, and 5th to 95th percentile where they differ"
    ),
    Column(
        COMPRESSION,
        "measured",
        "tokens in per token out, over all samples",
        1.0,
        2,
        None,
        False,
        "x",
    ),
    Column(
        "ms_per_sample",
        "ms / sample",
        "backbone + merger + prior in evaluation mode, one batch, fastest of 20 calls",
    ),
    Column("ms_merge", "merger ms", "the merger's part of it", spread=False),
    Column("prior_flops_per_sample", "prior MFLOPs", "forward pass of the prior, per sample", 1e-6),
    Column(
        "peak_memory_bytes",
        "memory MiB",
        "activations that a training step of merger and prior keeps for its backward pass, per batch",
        1 / MIB,
    ),
)


def shown(rows: Sequence[Row]) -> list[Column]:
    """The columns that say something: any row has the figure, and bits only where targets are text."""
    text = any(run.raw.get("modality") in ("text", "paired") for row in rows for run in row.runs)
    return [c for c in COLUMNS if (c is not BITS or text) and any(row.seen(c.key) for row in rows)]


def cell(row: Row, column: Column, short: bool = False) -> str:
    """``mean ± spread``, or ``mean (p5-p95)`` for tokens kept.

    Args:
        row: the row.
        column: the column.
        short: leave spreads and percentiles out.

    Returns:
        The text; ``-`` where the figure is not known.
    """
    mean, deviation = row.mean(column.key) * column.factor, row.spread(column.key) * column.factor
    if not math.isfinite(mean):
        return ABSENT
    if column.key == KEPT:
        low, high = row.mean("tokens/kept_p5"), row.mean("tokens/kept_p95")
        same = short or math.isnan(low) or math.isnan(high) or low == high
        return count(mean) if same else f"{count(mean)} ({count(low)}\u2013{count(high)})"
    places = decimals(mean) if column.places is None else column.places
    text = f"{mean:.{places}f}{column.unit}"
    # What cannot vary with the seed (the FLOPs of a fixed budget) shows no spread of zero.
    varies = math.isfinite(deviation) and deviation > 1e-9 * abs(mean)
    return f"{text} \u00b1 {deviation:.{places}f}" if column.spread and varies and not short else text


def best_rows(rows: Sequence[Row], column: Column) -> set[int]:
    """Indices of the best merging row of each compression; empty for columns that mark none."""
    best: dict[float | None, tuple[float, int]] = {}
    for place, row in enumerate(rows):
        value = row.mean(column.key) * (-1 if column.best == "high" else 1)
        if column.best is None or row.full or math.isnan(value):
            continue
        if row.target not in best or value < best[row.target][0]:
            best[row.target] = (value, place)
    return {place for _, place in best.values()}
