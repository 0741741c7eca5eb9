"""Training curves of a run, read from its metrics.csv."""

from __future__ import annotations

import csv
import math
from pathlib import Path

FILE = "metrics.csv"
Curve = list[tuple[float, float]]


def read_curves(run_dir: Path, names: tuple[str, ...]) -> dict[str, Curve]:
    """Curves by name, as (step, value) in the order of the file.

    A row of Lightning's CSV logger holds what was logged at one moment, so most of its cells are empty. Where
    a resumed run logged a step again, the later value holds. A part of a mixture has a folder in the run's directory
    and columns of its own in the run's file: `train/loss/target` is `train/video/loss/target` there.

    Args:
        run_dir: the run's directory, or the folder of a mixture's part.
        names: columns wanted.

    Returns:
        The curves that the file has; empty without a file.
    """
    path, columns = run_dir / FILE, {name: name for name in names}
    if not path.is_file():
        path = run_dir.parent / FILE
        columns = {name: name.replace("/", f"/{run_dir.name}/", 1) for name in names}
    if not path.is_file():
        return {}
    points: dict[str, dict[float, float]] = {name: {} for name in names}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for name in names:
                value = _number(row.get(columns[name]))
                if math.isfinite(step) and math.isfinite(value):
                    points[name][step] = value
    return {name: sorted(curve.items()) for name, curve in points.items() if curve}


def _number(text: str | None) -> float:
    """NaN for what is empty or cut off by a crash."""
    try:
        return float(text or math.nan)
    except ValueError:
        return math.nan


def mean_curve(curves: list[Curve]) -> Curve:
    """Mean over runs at the steps that all of them have."""
    if not curves:
        return []
    shared = set.intersection(*({step for step, _ in curve} for curve in curves))
    tables = [dict(curve) for curve in curves]
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in sorted(shared)]


def smoothed(curve: Curve, points: int = 60) -> Curve:
    """Means of equal stretches, so that a noisy curve has at most ``points`` points."""
    stretch = max(1, math.ceil(len(curve) / points))
    parts = [curve[i : i + stretch] for i in range(0, len(curve), stretch)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
