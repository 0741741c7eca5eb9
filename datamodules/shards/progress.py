"""Progress bars for a person at a terminal, and verdicts that stay one line wherever they go; both on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


@cache
def _console() -> Console:
    """Imported when something is said: outside the environment the command line can still say what is missing."""
    from rich.console import Console

    return Console(stderr=True)


def track(work: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Go through some work under a progress bar; without one where nobody would see it move."""
    from rich import progress

    hidden = total == 0 or not _console().is_terminal
    yield from progress.track(
        work, description=description, total=total, console=_console(), disable=hidden, transient=True
    )


def say(verdict: str, text: str) -> None:
    """Print a verdict, above the bar if there is one; unbroken, so that it can be searched for."""
    _console().print(f"{verdict:<5} {text}", soft_wrap=True, markup=False, highlight=False, emoji=False)
