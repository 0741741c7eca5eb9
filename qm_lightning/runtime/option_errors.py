"""What jsonargparse says of a wrong option, in one line that names it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LISTED = 12  # a class with more arguments than these has them in its docstring


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
        taken = re.findall(r"\(it takes ([\w, ]+)\)", line)
        names = taken[-1].split(", ") if taken else []
        near = difflib.get_close_matches(refused[-1], names, n=1)
        hint = f"did you mean {near[0]}?" if near else "see its docstring"
        # The outermost key names the whole path that the user wrote.
        place = re.search(r'Parser key "([\w.]+)"', line)
        paths = re.findall(r"NestedArg\(key='([\w.]+)'", line)
        written = max([refused[-1], *paths], key=len)
        name = f"--{place[1]}.{written}" if place else f"--{written}"
        wanted = (
            f"one of {', '.join(names)}" if 0 < len(names) < LISTED and not near else "one of its arguments"
        )
        return f"found {name}, which that class does not take; expected {wanted}; {hint}"
    return line


def name_arguments(message: str, taken: Iterable[str]) -> str:
    """Add to a refusal which arguments the class takes, for :func:`explain`.

    Args:
        message: of the parser of a class's arguments.
        taken: names of its arguments.

    Returns:
        The message, longer if it refuses an argument itself.
    """
    if not re.fullmatch(r"Option '[\w.]+' is not accepted\s*", message):
        return message
    names = [name for name in taken if name not in ("help", "print_shtab")]
    return f"{message.strip()} (it takes {', '.join(names)})"
