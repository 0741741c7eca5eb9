"""Pictures of merging: which patches, frames or bytes went into which merged token.

Each group of two or more tokens has one colour (Okabe and Ito's palette, safe for colour-blind readers);
neighbouring groups differ and lines lead from a group's members to its anchor, so a colour that is used twice
is not ambiguous.
A token that stays alone is left as it is, a dropped one is darkened (grids) or greyed (text).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qm_lightning.text_grid import draw_text

if TYPE_CHECKING:
    from qm_lightning.tokens import MergedTokens, Tokens

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
OVERLAY = 0.6  # opacity of a group's colour over the picture
DROPPED_OVERLAY = 0.72
MAX_FRAMES = 8
PANEL = 3.0  # inches, the edge of one picture
GRID_COORDINATES = 2


@dataclass(frozen=True)
class Groups:
    """Where the tokens of one sample went.

    Attributes:
        positions: [n,P] int, coordinates of the n valid tokens.
        group: [n] int, merged token of each, -1 = dropped.
        anchor: [n] int, index in [0,n) of the group's anchor; -1: the method has none, or dropped.
        size: [n] int, tokens in the same group.
        kept: merged tokens.
        special: [n] bool, tokens that are no patch and no piece of text (a class token).
    """

    positions: NDArray[np.int64]
    group: NDArray[np.int64]
    anchor: NDArray[np.int64]
    size: NDArray[np.int64]
    kept: int
    special: NDArray[np.bool_]

    @property
    def budget(self) -> str:
        """The budget in words: ``25 of 64 tokens``."""
        return f"{self.kept} of {len(self.group)} tokens"

    def select(self, chosen: NDArray[np.bool_]) -> Groups:
        """The chosen tokens only; anchors outside the choice become -1."""
        place = np.cumsum(chosen) - 1
        anchor = self.anchor[chosen]
        anchor = np.where((anchor >= 0) & chosen[anchor], place[anchor], -1)
        return Groups(
            self.positions[chosen],
            self.group[chosen],
            anchor,
            self.size[chosen],
            self.kept,
            self.special[chosen],
        )

    def colours(self) -> NDArray[np.float64]:
        """[n,3] RGB of each token's group; NaN for tokens that stand alone or are dropped.

        The largest groups choose first: a colour that no touching group has, the least used one so far.
        """
        at = {
            tuple(position): g
            for position, g in zip(self.positions.tolist(), self.group.tolist(), strict=True)
        }
        touching: dict[int, set[int]] = {}
        for position, g in at.items():
            for axis in range(len(position)):
                beside = at.get((*position[:axis], position[axis] + 1, *position[axis + 1 :]))
                if beside is not None and beside != g:
                    touching.setdefault(g, set()).add(beside)
                    touching.setdefault(beside, set()).add(g)
        sizes = Counter(g for g in self.group.tolist() if g >= 0)
        chosen: dict[int, int] = {}
        used: Counter[int] = Counter()
        for g, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            if size > 1:
                taken = {chosen[other] for other in touching.get(g, ()) if other in chosen}
                free = [c for c in range(len(PALETTE)) if c not in taken] or list(range(len(PALETTE)))
                chosen[g] = min(free, key=lambda c: (used[c], c))
                used[chosen[g]] += 1
        rgb = np.full((len(self.group), 3), np.nan)
        for row, g in enumerate(self.group.tolist()):
            if g in chosen:
                rgb[row] = to_rgb(PALETTE[chosen[g]])
        return rgb


def read_groups(tokens: Tokens, merged: MergedTokens, index: int) -> Groups:
    """One sample's groups, as arrays on the CPU.

    Args:
        tokens: what went into the merger.
        merged: what came out.
        index: the sample, in [0,B).

    Returns:
        The groups of the sample's valid tokens.
    """
    mask = tokens.mask[index].cpu().numpy()
    group = merged.assignment[index].cpu().numpy()[mask]
    protected = (
        np.zeros(len(mask), bool) if tokens.protected is None else tokens.protected[index].cpu().numpy()
    )
    anchor = np.full(len(group), -1)
    if merged.anchors is not None:
        place = np.cumsum(mask) - 1
        of_group = place[merged.anchors[index].cpu().numpy()]
        anchor = np.where(group >= 0, of_group[group], -1)
    counts = np.bincount(group[group >= 0], minlength=1)
    size = np.where(group >= 0, counts[group], 0)
    kept = int(merged.mask[index].sum())
    positions = tokens.positions[index].cpu().numpy()[mask]
    return Groups(positions, group, anchor, size, kept, protected[mask])


def merge_picture(
    inputs: Any, merged: MergedTokens, index: int, *, tokens: Tokens, title: str | None = None
) -> Figure:
    """Draw what a merger did to one sample.

    Args:
        inputs: what the sample looks like: a float array in [0,1], [H,W] or [H,W,3] (image), [F,H,W] or
            [F,H,W,3] (video); or a list of strings, one per token of the padded row or per valid one (text).
        merged: the merger's output for the batch.
        index: the sample, in [0,B).
        tokens: the merger's input for the batch; its positions tell text, images and video apart.
        title: printed before the budget.

    Returns:
        A figure on the Agg canvas; ``figure.savefig(path)`` writes it. No pyplot state is touched.

    Raises:
        ValueError: the number of strings is not that of the tokens.
    """
    groups = read_groups(tokens, merged, index)
    heading = groups.budget if title is None else f"{title}   {groups.budget}"
    if groups.positions.shape[1] == 1:
        return _text_picture(inputs, groups, tokens.mask[index].cpu().numpy(), heading)
    groups = groups.select(~groups.special)
    frames = _frames(np.asarray(inputs, dtype=np.float64), groups)
    head = 0.3 if len(frames) == 1 else 0.55  # inches; each of several frames has a line of its own
    figure = Figure(figsize=(PANEL * len(frames) + 0.1, PANEL + head), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - head / (PANEL + head), wspace=0.04)
    colours = groups.colours()
    anchored = np.arange(len(groups.group)) == groups.anchor
    for place, (name, picture, chosen) in enumerate(frames):
        axes = figure.add_subplot(1, len(frames), place + 1)
        _draw_grid(axes, picture, groups.select(chosen), colours[chosen])
        if name:
            here = f": {int(anchored[chosen].sum())} kept" if anchored.any() else ""
            axes.set_title(name + here, loc="left", fontsize=9, pad=3)
    figure.suptitle(
        heading, x=0.01, y=0.995, ha="left", va="top", fontsize=11, fontweight="bold", parse_math=False
    )
    return figure


def _text_picture(strings: Sequence[str], groups: Groups, mask: NDArray[np.bool_], heading: str) -> Figure:
    if len(strings) == len(mask):
        strings = [text for text, real in zip(strings, mask.tolist(), strict=True) if real]
    if len(strings) != len(groups.group):
        raise ValueError(
            f"{len(strings)} strings for {len(groups.group)} tokens; expected one string per token"
        )
    anchored = np.arange(len(groups.group)) == groups.anchor
    return draw_text(strings, groups.colours(), anchored & (groups.size > 1), groups.group < 0, heading)


def _frames(
    inputs: NDArray[np.float64], groups: Groups
) -> list[tuple[str, NDArray[np.float64], NDArray[np.bool_]]]:
    """Pictures to draw, each with its name (a still picture has none) and the tokens that lie on it."""
    if groups.positions.shape[1] == GRID_COORDINATES:
        return [("", inputs, np.ones(len(groups.group), bool))]
    times = groups.positions[:, 0]
    steps = int(times.max()) + 1
    shown = np.unique(np.linspace(0, steps - 1, min(steps, MAX_FRAMES)).round().astype(int))
    moving = inputs.ndim > 3 or (inputs.ndim == 3 and inputs.shape[-1] != 3)
    # A model may read several frames as one step; the first of them stands for all.
    if not moving:
        return [(f"step {t}", inputs, times == t) for t in shown.tolist()]
    firsts = [(t, len(inputs) * t // steps) for t in shown.tolist()]
    return [(f"frame {first}", inputs[first], times == t) for t, first in firsts]


def _draw_grid(axes: Any, picture: NDArray[np.float64], groups: Groups, colours: NDArray[np.float64]) -> None:
    cells = groups.positions[:, -2:]
    rows, columns = (int(edge) + 1 for edge in cells.max(axis=0))
    axes.imshow(
        picture, cmap="gray", vmin=0.0, vmax=1.0, extent=(0, columns, rows, 0), interpolation="nearest"
    )
    overlay = np.zeros((rows, columns, 4))
    merged = ~np.isnan(colours[:, 0])
    overlay[cells[merged, 0], cells[merged, 1]] = np.c_[colours[merged], np.full(int(merged.sum()), OVERLAY)]
    dropped = groups.group < 0
    overlay[cells[dropped, 0], cells[dropped, 1]] = (0.16, 0.17, 0.2, DROPPED_OVERLAY)
    axes.imshow(overlay, extent=(0, columns, rows, 0), interpolation="nearest")
    label = np.full((rows, columns), -2)
    label[cells[:, 0], cells[:, 1]] = groups.group
    axes.add_collection(
        LineCollection(_borders(label), colors="white", linewidths=0.9, capstyle="projecting")
    )
    centre = cells[:, ::-1] + 0.5
    led = (groups.anchor >= 0) & (groups.size > 1)
    spokes = np.stack([centre[led], centre[groups.anchor[led]]], axis=1)
    for colour, width in (("black", 1.1), ("white", 0.55)):  # a casing keeps the lines visible on any colour
        axes.add_collection(LineCollection(list(spokes), colors=colour, linewidths=width, capstyle="round"))
    anchors = centre[np.arange(len(centre)) == groups.anchor]
    axes.scatter(*anchors.T, s=14, c="white", edgecolors="black", linewidths=0.8, zorder=3)
    axes.set(xlim=(-0.02, columns + 0.02), ylim=(rows + 0.02, -0.02))
    axes.set_axis_off()


def _borders(label: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Edges between cells of different groups, and the frame; as [2,2] segments of (x, y)."""
    padded = np.pad(label, 1, constant_values=-3)
    upright = np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:])
    level = np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1])
    return [np.array([[x, y], [x, y + 1]], float) for y, x in upright] + [
        np.array([[x, y], [x + 1, y]], float) for y, x in level
    ]
