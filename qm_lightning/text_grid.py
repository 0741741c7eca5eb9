"""Text as a grid of characters, coloured by the merged token that each piece went into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

COLUMNS = 64  # characters a line
MAX_LINES = 16
CELL = (0.105, 0.2)  # inches, width and height of a character
FONT = "DejaVu Sans Mono"  # ships with matplotlib
TINT = 0.45  # opacity of a group's colour behind the text
VISIBLE = {"\n": "\u21b5", "\t": "\u2192", "\r": "\u240d", " ": "\u00b7"}
UNKNOWN = "\u25a1"  # a hollow square


@dataclass(frozen=True)
class Piece:
    """One token on the page: its place in characters, and what is printed."""

    token: int
    line: int
    column: int
    text: str


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())


def visible(text: str) -> str:
    """The text with white space made visible and characters that the font lacks replaced."""
    shown = (VISIBLE.get(c, c) for c in text)
    return (
        "".join(c if c.isprintable() and ord(c) in _known_characters() else UNKNOWN for c in shown) or UNKNOWN
    )


def lay_out(strings: Sequence[str]) -> list[Piece]:
    """Place tokens in lines of 64 characters; a token moves to the next line rather than being broken."""
    pieces: list[Piece] = []
    line = column = 0
    for token, string in enumerate(strings):
        text = visible(string)[:COLUMNS]
        if column + len(text) > COLUMNS:
            line, column = line + 1, 0
        if line == MAX_LINES:
            break
        pieces.append(Piece(token, line, column, text))
        column += len(text)
    return pieces


def draw_text(
    strings: Sequence[str],
    colours: NDArray[np.float64],
    underlined: NDArray[np.bool_],
    dropped: NDArray[np.bool_],
    heading: str,
) -> Figure:
    """Draw the tokens of a text.

    Args:
        strings: n strings, one per token.
        colours: [n,3] RGB behind each token; NaN = none.
        underlined: [n] bool.
        dropped: [n] bool, tokens printed in a pale grey.
        heading: printed above.

    Returns:
        A figure on the Agg canvas, as high as the text needs and at most 16 lines of it.
    """
    pieces = lay_out(strings)
    lines = pieces[-1].line + 1
    if len(pieces) < len(strings):
        heading += f"   (the first {len(pieces)} are shown)"
    width, height = COLUMNS * CELL[0] + 0.2, lines * CELL[1] + 0.4
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0.1 / width, 0.08 / height, 1 - 0.2 / width, lines * CELL[1] / height))
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.set_axis_off()
    tinted = [p for p in pieces if not np.isnan(colours[p.token, 0])]
    boxes = [Rectangle((p.column + 0.03, p.line + 0.06), len(p.text) - 0.06, 0.88) for p in tinted]
    faces = [(*colours[p.token], TINT) for p in tinted]
    axes.add_collection(PatchCollection(boxes, facecolors=faces or "none", edgecolors="none"))
    rules = [
        [(p.column + 0.1, p.line + 0.93), (p.column + len(p.text) - 0.1, p.line + 0.93)]
        for p in pieces
        if underlined[p.token]
    ]
    axes.add_collection(LineCollection(rules, colors="black", linewidths=1.4))
    style = {"family": FONT, "fontsize": 9.5, "ha": "center", "va": "center", "parse_math": False}
    for p in pieces:
        white_space = p.text in VISIBLE.values()
        colour = "#c0c3cb" if dropped[p.token] else "#8b8f99" if white_space else "#15171c"
        for offset, character in enumerate(p.text):
            at = (p.column + offset + 0.5, p.line + 0.5)
            axes.text(*at, character, color=colour, **style)
    figure.text(
        0.1 / width,
        1 - 0.06 / height,
        heading,
        ha="left",
        va="top",
        fontsize=11,
        fontweight="bold",
        parse_math=False,
    )
    return figure
