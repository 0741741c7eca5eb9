"""Plots: axes that can be read and legends that can be seen."""

from __future__ import annotations

import pytest
from matplotlib.transforms import Bbox

from qm_lightning.reporting.style import Look, legend, new_figure, scale


def test_neighbouring_ticks_are_told_apart() -> None:
    """Three digits would name the ticks 1.875 and 1.925 as 1.88 and 1.93."""
    figure = new_figure(4.0, 4.0)
    axes = figure.add_subplot()
    values = [1.861, 1.971]
    axes.plot(values, values)
    scale(axes.yaxis, axes.set_yscale, values)
    figure.canvas.draw()
    for tick in axes.yaxis.get_major_ticks():
        assert float(tick.label1.get_text()) == pytest.approx(tick.get_loc(), abs=1e-9)


@pytest.mark.parametrize("width", [6.4, 11.2])
def test_a_legend_of_long_names_stays_inside_the_figure(width: float) -> None:
    names = ["QuickMerge", "InBackbone(merger=DynamicViT)", "InBackbone(merger=ToMe)", "ToFu(mode=prune)"]
    figure = new_figure(width, 4.6)
    figure.add_subplot()
    legend(figure, {f"{name}{i}": Look("#000000", "o", False) for name in names for i in range(3)})
    figure.canvas.draw()
    page = Bbox([[0, 0], figure.get_size_inches() * figure.dpi])
    for shown in figure.legends:
        box = shown.get_window_extent()
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
