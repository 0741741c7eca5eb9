"""How methods look in plots: one colour and one marker each, the same in every plot of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from qm_lightning.reporting.columns import number
from qm_lightning.reporting.findings import OURS
from qm_lightning.reporting.rows import Row

# Okabe and Ito's palette, yellow (too pale for lines) replaced by Tol's indigo, wine and olive.
COLOURS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
    "#999933",
    "#555555",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
WIDE_RANGE = 4.0  # from this ratio of largest to smallest on, an axis is logarithmic
INK = "#30333b"
ENTRY_INCHES, LETTER_INCHES = 0.5, 0.08  # of a legend: line, marker and gap; a letter of 8.5 points


@dataclass(frozen=True)
class Look:
    """Colour, marker, and whether the method stands out."""

    colour: str
    marker: str
    strong: bool


def looks(rows: Sequence[Row]) -> dict[str, Look]:
    """A look for each method: QuickMerge first, all tokens black, the rest by name."""
    merging = {row.method: row.merger for row in rows if not row.full}
    ordered = sorted(merging, key=lambda method: (merging[method] != OURS, method))
    styled = {
        method: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], merging[method] == OURS)
        for i, method in enumerate(ordered)
    }
    return styled | {row.method: Look("#000000", "*", False) for row in rows if row.full}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure on the Agg canvas; no pyplot state is touched."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any, title: str, x: str, y: str) -> None:
    """Titles and a quiet frame."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(True, color="#e7e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def scale(axis: Any, set_scale: Any, values: Sequence[float], base: float = 10.0) -> None:
    """Logarithmic with plain numbers where the values range widely, linear otherwise."""
    plain = FuncFormatter(
        lambda value, _: number(value).rstrip("0").rstrip(".") if "." in number(value) else number(value)
    )
    if values and min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        set_scale("log")
        axis.set_major_locator(LogLocator(base=base, subs=(1.0, 2.0, 3.0, 5.0) if base == 10.0 else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
    else:  # as many digits as tell neighbouring ticks apart: three would make 1.925 a 1.93
        axis.set_major_locator(MaxNLocator(6))
        digits = ScalarFormatter(useOffset=False)
        digits.set_scientific(False)
        axis.set_major_formatter(digits)


def legend(figure: Figure, styled: dict[str, Look], columns: int = 6) -> None:
    """One legend below all panels, of at most so many columns and no wider than the figure."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            markersize=6,
            linewidth=2 if look.strong else 1.2,
            label=name,
        )
        for name, look in styled.items()
    ]
    widest = ENTRY_INCHES + LETTER_INCHES * max(map(len, styled), default=0)
    columns = max(1, min(columns, int(figure.get_figwidth() / widest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
