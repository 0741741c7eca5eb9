"""The plots of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from qm_lightning.reporting.columns import MIB, count
from qm_lightning.reporting.curves import mean_curve, read_curves, smoothed
from qm_lightning.reporting.rows import KEPT, QUALITY, Row, pareto_front, targets
from qm_lightning.reporting.style import INK, Look, dress, legend, looks, new_figure, scale

LOSS = "nats per target token (test)"
COSTS = (
    (KEPT, 1.0, "tokens kept per sample"),
    ("ms_per_sample", 1.0, "milliseconds per sample"),
    ("prior_flops_per_sample", 1e-6, "prior MFLOPs per sample"),
    ("peak_memory_bytes", 1 / MIB, "activation memory of a training step, MiB per batch"),
)
TRAIN_LOSS, VALIDATION_LOSS = "train/loss/target", "val/quality/nats"
PARTS = (
    ("ms_backbone", "backbone", "#c9ccd4"),
    ("ms_merge", "merger", "#D55E00"),
    ("ms_prior", "prior", "#0072B2"),
)


def pareto_plot(rows: Sequence[Row]) -> Figure | None:
    """Loss against tokens, time, FLOPs and memory; ``None`` if no two rows have them: one point shows nothing."""
    present = [cost for cost in COSTS if _points(rows, *cost[:2]) > 1]
    if not present:
        return None
    styled = looks(rows)
    columns = min(2, len(present))
    figure = new_figure(5.6 * columns, 4.0 * math.ceil(len(present) / columns) + 0.5)
    for place, (key, factor, label) in enumerate(present):
        axes = figure.add_subplot(math.ceil(len(present) / columns), columns, place + 1)
        _pareto_panel(axes, rows, styled, key, factor)
        dress(axes, f"loss against {label.split(',')[0]}", label, LOSS)
    legend(figure, styled)
    return figure


def tokens_plot(rows: Sequence[Row]) -> Figure | None:
    """Loss against tokens kept alone, for a README or a slide; ``None`` for a single point."""
    if _points(rows, KEPT, 1.0) < 2:
        return None
    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    styled = looks(rows)
    _pareto_panel(axes, rows, styled, KEPT, 1.0)
    dress(axes, "Fewer tokens to the left, lower loss to the bottom", COSTS[0][2], LOSS)
    legend(figure, styled, columns=4)
    return figure


def _point(row: Row, key: str, factor: float) -> tuple[float, float] | None:
    x, y = row.mean(key) * factor, row.mean(QUALITY)
    return None if math.isnan(x) or math.isnan(y) else (x, y)


def _points(rows: Sequence[Row], key: str, factor: float) -> int:
    return sum(_point(row, key, factor) is not None for row in rows)


def _pareto_panel(
    axes: object, rows: Sequence[Row], styled: dict[str, Look], key: str, factor: float
) -> None:
    placed = [(row, point) for row in rows if (point := _point(row, key, factor)) is not None]
    points = [point for _, point in placed]
    front = [points[i] for i in pareto_front(points)]
    front.append((max(x for x, _ in points), front[-1][1]))
    # Up to the next point of the front nothing better is known, hence the steps.
    axes.step(*zip(*front, strict=True), where="post", color="#d6d9e0", linewidth=7, zorder=1)  # type: ignore[attr-defined]
    for method, look in styled.items():
        own = sorted(((row, p) for row, p in placed if row.method == method), key=lambda item: item[1][0])
        if not own:
            continue
        errors = [0.0 if math.isnan(s := row.spread(QUALITY)) else s for row, _ in own]
        axes.errorbar(  # type: ignore[attr-defined]
            [p[0] for _, p in own],
            [p[1] for _, p in own],
            yerr=errors if any(errors) else None,
            color=look.colour,
            marker=look.marker,
            markersize=11 if look.marker == "*" else 7 if look.strong else 5.5,
            linewidth=2.2 if look.strong else 1.1,
            elinewidth=1.0,
            capsize=2.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=4 if look.strong else 3,
        )
    scale(axes.xaxis, axes.set_xscale, [x for x, _ in points], 2.0 if key == KEPT else 10.0)  # type: ignore[attr-defined]
    scale(axes.yaxis, axes.set_yscale, [y for _, y in points])  # type: ignore[attr-defined]


def time_plot(rows: Sequence[Row]) -> Figure | None:
    """Where the time goes: backbone, merger, prior; one bar per method and compression."""
    timed = [row for row in rows if row.seen("ms_merge") and row.seen("ms_prior")]
    if not timed:
        return None
    figure = new_figure(9.0, 0.24 * len(timed) + 1.1)
    axes = figure.add_subplot()
    start = [0.0] * len(timed)
    for key, name, colour in PARTS:
        values = [0.0 if math.isnan(row.mean(key)) else row.mean(key) for row in timed]
        axes.barh(range(len(timed)), values, left=start, color=colour, label=name, height=0.72)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.set_yticks(range(len(timed)), [row.name for row in timed])
    axes.invert_yaxis()
    dress(axes, "Where the time goes", "milliseconds per sample", "")
    axes.grid(False, axis="y")
    axes.margins(y=0.01)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, frameon=False)
    return figure


def kept_plot(rows: Sequence[Row]) -> Figure | None:
    """Tokens kept per sample: 5th percentile, mean, 95th percentile."""
    known = [row for row in rows if row.seen(KEPT)]
    if not known:
        return None
    styled = looks(rows)
    figure = new_figure(9.0, 0.24 * len(known) + 1.0)
    axes = figure.add_subplot()
    for place, row in enumerate(known):
        look, mean = styled[row.method], row.mean(KEPT)
        low, high = row.mean("tokens/kept_p5"), row.mean("tokens/kept_p95")
        if not math.isnan(low):
            axes.plot(
                [low, high],
                [place, place],
                color=look.colour,
                linewidth=5,
                alpha=0.45,
                solid_capstyle="round",
            )
        axes.plot(mean, place, color=look.colour, marker=look.marker, markersize=6)
        axes.annotate(
            count(mean),
            (mean if math.isnan(high) else high, place),
            (8, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            va="center_baseline",
        )
    axes.set_yticks(range(len(known)), [row.name for row in known])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    dress(axes, "Tokens kept per sample: 5th percentile, mean, 95th percentile", "tokens", "")
    axes.grid(False, axis="y")
    axes.margins(y=0.01)
    return figure


def curves_plot(rows: Sequence[Row]) -> Figure | None:
    """Training and validation loss, one column per compression, all tokens in every column."""
    styled = looks(rows)
    columns = targets(rows) or [None]
    names = (TRAIN_LOSS, VALIDATION_LOSS)
    curves = {id(row): [read_curves(run.path, names) for run in row.runs] for row in rows}
    present = [name for name in names if any(name in c for own in curves.values() for c in own)]
    if not present:
        return None
    figure = new_figure(3.5 * len(columns) + 0.6, 2.7 * len(present) + 0.6)
    grid = figure.subplots(len(present), len(columns), squeeze=False, sharey="row", sharex=True)
    for line, name in enumerate(present):
        heights: list[float] = []
        for place, target in enumerate(columns):
            axes = grid[line][place]
            for row in rows:
                if not row.full and row.target != target:
                    continue
                curve = smoothed(mean_curve([own[name] for own in curves[id(row)] if name in own]))
                if curve:
                    look = styled[row.method]
                    axes.plot(
                        *zip(*curve, strict=True), color=look.colour, linewidth=2.0 if look.strong else 1.1
                    )
                    heights += [value for _, value in curve]
            title = {TRAIN_LOSS: "training loss", VALIDATION_LOSS: "validation loss"}[name]
            at = "" if target is None else f", {target:g}x"
            dress(
                axes,
                title + at,
                "step" if line + 1 == len(present) else "",
                "nats per target token" if not place else "",
            )
        scale(grid[line][0].yaxis, grid[line][0].set_yscale, heights)
    legend(figure, styled, columns=min(6, 2 * len(columns)))
    return figure
