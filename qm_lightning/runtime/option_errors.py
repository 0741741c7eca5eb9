"""What jsonargparse says of a wrong option, in one line that names it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib import import_module

from qm_lightning.runtime.allowed_imports import ALLOWED_PACKAGES

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
    for reading in (
        _unknown_option,
        _refused_argument,
        _forbidden_class,
        _no_class,
        _wrong_type,
        _no_file,
        _missing,
        _tried_types,
    ):
        if (found := reading(line, list(known))) is not None:
            return found
    return line


def _written(line: str, last: str = "") -> str:
    """The option as the user wrote it: the outermost key names the whole path."""
    place = re.search(r'Parser key "([\w.]+)"', line)
    paths = [path for path in re.findall(r"NestedArg\(key='([\w.]+)'", line) if path.endswith(last)]
    inner = max([last, *paths], key=len)
    return "--" + ".".join(filter(None, [place[1] if place else "", inner]))


def _unknown_option(line: str, known: list[str]) -> str | None:
    stray = re.fullmatch(r"unrecognized arguments: ([^-].*)", line)
    if stray:
        return f"found {stray[1]!r}, which belongs to no option; expected --NAME VALUE; see --help"
    # A parser of a class's arguments has already said so of its own part, inside a longer message.
    inner = re.search(r"^Parser key .*found --([\w.+-]+), (which is no option; .*?)(?: - Expected a|$)", line)
    if inner:
        return f"found {_written(line, inner[1])}, {inner[2]}"
    unknown = re.search(r"unrecognized arguments: (--[\w.+-]+)", line)
    if not unknown:
        return None
    # If its first word is wrong, the rest is no help: --modle.depth means --model.
    head, heads = unknown[1].partition(".")[0], sorted({name.partition(".")[0] for name in known})
    near = difflib.get_close_matches(unknown[1], known, n=1)
    if head not in heads and "." in unknown[1]:
        near = difflib.get_close_matches(head, heads, n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"found {unknown[1]}, which is no option; expected one of this verb's; {hint}"


def _refused_argument(line: str, known: list[str]) -> str | None:
    refused = re.findall(r"Option '([\w.]+)' is not accepted", line)
    if not refused:
        return None
    taken = re.findall(r"\(it takes ([\w, ]+)\)", line)
    names = taken[-1].split(", ") if taken else []
    near = difflib.get_close_matches(refused[-1], names, n=1)
    hint = f"did you mean {near[0]}?" if near else "see its docstring"
    wanted = f"one of {', '.join(names)}" if 0 < len(names) < LISTED and not near else "one of its arguments"
    return f"found {_written(line, refused[-1])}, which that class does not take; expected {wanted}; {hint}"


def _forbidden_class(line: str, known: list[str]) -> str | None:
    forbidden = re.search(r"Importing '([\w.]+)' is not allowed", line)
    if not forbidden:
        return None
    return (
        f"found {_written(line)} {forbidden[1]}; expected a class of {', '.join(ALLOWED_PACKAGES)}: no other one "
        "can be named, since that runs its code; choose one of these"
    )


def _no_class(line: str, known: list[str]) -> str | None:
    name = re.search(r"Expected a dot import path string: (\S+)", line) or re.search(
        r"class_path '([\w.]+)': .*(?:has no attribute|No module named)", line
    )
    if not name or "Parser key" not in line:
        return None
    wanted = name[1].rpartition(".")[2]
    near = difflib.get_close_matches(wanted, _class_names(), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near and near[0] != wanted else "check the spelling"
    return (
        f"found {_written(line)} {name[1]}, which is no class that goes there; expected its short name or "
        f"PACKAGE.CLASS; {hint}"
    )


def _class_names() -> list[str]:
    """What our packages export, for a suggestion."""
    packages = [
        "datamodules",
        *(f"qm_lightning.{name}" for name in ("backbones", "merging", "modules", "priors")),
    ]
    return [name for package in packages for name in import_module(package).__all__]


def _wrong_type(line: str, known: list[str]) -> str | None:
    choices = re.findall(r"Literal\[([^\]]+)\]", line.partition(" Errors: ")[2])
    given = re.search(r"Given value: (\S+)$", line)
    if choices and given and "NestedArg" not in given[1]:
        return f"found {_written(line)} {given[1]}; expected one of {', '.join(choices)}; give one"
    wrong = re.search(
        r"Expected a (?P<type>(?:(?!Expected a ).)+?)\. Got value: (?P<value>.+?)(?: - |$)", line
    )
    if not wrong or "Parser key" not in line:
        return None
    keys = re.findall(r'Parser key "([\w.]+)"', line)
    last = keys[-1] if len(keys) > 1 else ""
    wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", wrong["type"])
    wanted = re.sub(r"^(?:typing\.)?Literal\[(.*)\]$", r"one of \1", wanted)
    return f"found {_written(line, last)} {wrong['value']}; expected {wanted}; give one"


def _no_file(line: str, known: list[str]) -> str | None:
    absent = re.fullmatch(r'Parser key "config": File does not exist: \'?(.+?)\'?', line)
    if not absent:
        return None
    return (
        f"found no file {absent[1]}; expected an experiment; give --config configs/experiment/NAME.yaml, "
        "from the folder of train.py"
    )


def _missing(line: str, known: list[str]) -> str | None:
    missing = re.fullmatch(r"the following arguments are required: ((?:\w+\.\w+(?:, )?)+)", line)
    if not missing:
        return None
    names = ", ".join(name.partition(".")[2] for name in missing[1].split(", "))
    return f"found no {names}; expected an experiment; give --config configs/experiment/NAME.yaml"


def _tried_types(line: str, known: list[str]) -> str | None:
    """What is wrong inside a class that may also be left out; the rest of the message prints all its arguments."""
    tried = re.search(r"Errors: - (.+?) - Expected a <class 'NoneType'>", line)
    if not tried:
        return None
    missing = re.fullmatch(r"the following arguments are required: ([\w, ]+)", tried[1])
    if missing:
        at = f" of {_written(line)}" if "Parser key" in line else ""
        return f"found no {missing[1]}{at}, which its class requires; expected a value; give one"
    return tried[1] if "; expected " in tried[1] else None


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
