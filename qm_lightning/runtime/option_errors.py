"""What jsonargparse says of a wrong option, in one line that names it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Shorten the parser's message.

    Args:
        message: jsonargparse's, with a nested list of all types that it tried.
        known: option names, e.g. ``--trainer.max_steps``, for a suggestion.

    Returns:
        One line: the option, what is wrong, the nearest name if there is one.
    """
    line = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: (--[\w.+-]+)", line)
    if unknown:
        near = difflib.get_close_matches(unknown[1], list(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        return f"found {unknown[1]}, which is no option; expected one of this verb's; {hint}"
    refused = re.findall(r"Option '([\w.]+)' is not accepted", line)
    if refused:
        # The outermost key names the whole path that the user wrote.
        place = re.search(r'Parser key "([\w.]+)"', line)
        paths = re.findall(r"NestedArg\(key='([\w.]+)'", line)
        written = max([refused[-1], *paths], key=len)
        name = f"--{place[1]}.{written}" if place else f"--{written}"
        return (
            f"found {name}, which that class does not take; expected one of its arguments; see its docstring"
        )
    return line
