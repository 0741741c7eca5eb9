"""The text grid of a merge picture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qm_lightning.text_grid import COLUMNS, MAX_LINES, UNKNOWN, draw_text, lay_out, visible


def draw(strings: list[str], tinted: set[int] = frozenset(), dropped: set[int] = frozenset()) -> object:  # type: ignore[assignment]
    count = len(strings)
    colours = np.full((count, 3), np.nan)
    colours[sorted(tinted)] = 0.5
    gone = np.isin(np.arange(count), sorted(dropped))
    return draw_text(strings, colours, ~np.isnan(colours[:, 0]), gone, f"{count} tokens")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "a"),
        (" ", "\u00b7"),
        ("\n", "\u21b5"),
        ("\t", "\u2192"),
        ("\x00", UNKNOWN),
        ("", UNKNOWN),
        ("ab c", "ab\u00b7c"),
    ],
)
def test_white_space_and_control_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=90), min_size=1, max_size=200))
def test_pieces_stay_in_the_grid_and_never_overlap(strings: list[str]) -> None:
    pieces = lay_out(strings)
    taken: set[tuple[int, int]] = set()
    for place, piece in enumerate(pieces):
        assert piece.token == place
        cells = {(piece.line, piece.column + i) for i in range(len(piece.text))}
        assert cells
        assert not cells & taken
        assert piece.line < MAX_LINES
        assert piece.column + len(piece.text) <= COLUMNS
        taken |= cells
    assert len(pieces) == len(strings) or pieces[-1].line == MAX_LINES - 1


def test_bytes_fill_lines_of_64() -> None:
    pieces = lay_out(list("x" * 130))
    assert [(p.line, p.column) for p in (pieces[63], pieces[64], pieces[129])] == [(0, 63), (1, 0), (2, 1)]


def test_a_long_text_says_how_much_is_shown() -> None:
    figure = draw(["x"] * 3000)
    assert f"the first {COLUMNS * MAX_LINES} are shown" in figure.texts[0].get_text()  # type: ignore[attr-defined]


def test_source_code_and_odd_characters_are_drawn_without_a_warning() -> None:
    """Dollar signs are no formulas, and a character that the font lacks is no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(
            [*"cost = '$x^2$' \\frac{", "\u6f22", "\U0001f600", "\ud800"], tinted={1, 2}, dropped={3}
        )
        figure.canvas.draw()  # type: ignore[attr-defined]


def test_dropped_tokens_are_pale_and_groups_tinted() -> None:
    figure = draw(["a", "b", "c"], tinted={0}, dropped={1})
    shades = [text.get_color() for text in figure.axes[0].texts]  # type: ignore[attr-defined]
    assert shades[0] == shades[2] != shades[1]
    boxes, rules = figure.axes[0].collections  # type: ignore[attr-defined]
    assert len(boxes.get_paths()) == len(rules.get_segments()) == 1
