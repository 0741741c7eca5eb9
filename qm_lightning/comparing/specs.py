"""Mergers as they are written on the command line: ``QuickMerge``, ``ToFu(mode=mlerp)``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qm_lightning.errors import UserError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class MergerSpec:
    """A merger and some of its arguments.

    Attributes:
        label: as it was written, without spaces.
        name: class name.
        arguments: (key, value) as text; ``budget.KEY`` is an argument of the budget.
    """

    label: str
    name: str
    arguments: tuple[tuple[str, str], ...] = ()

    def get(self, key: str) -> str | None:
        """The value of an argument, ``None`` where it is not given."""
        return dict(self.arguments).get(key)


def split_outside_brackets(text: str) -> list[str]:
    """Parts between commas that stand in no bracket: ``A,B(x=1,y=[2,3])`` -> ``A``, ``B(x=1,y=[2,3])``."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def parse_specs(text: str) -> list[MergerSpec]:
    """Read ``--mergers``.

    Args:
        text: specs, separated by commas.

    Returns:
        The specs, in the order given.

    Raises:
        UserError: one is malformed or given twice.
    """
    specs = [_parse(part.replace(" ", "")) for part in split_outside_brackets(text)]
    labels = [spec.label for spec in specs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"--mergers names {twice} twice; expected each once")
    return specs


def _parse(text: str) -> MergerSpec:
    name, bracket, rest = text.partition("(")
    closed = rest.endswith(")") if bracket else True
    if not NAME.fullmatch(name) or not closed:
        raise UserError(
            f"--mergers has {text!r}; expected NAME or NAME(key=value,...), such as ToFu(mode=mlerp)"
        )
    arguments = []
    for part in split_outside_brackets(rest[:-1]) if bracket and rest != ")" else []:
        key, equals, value = part.partition("=")
        if not equals or not KEY.fullmatch(key) or not value:
            raise UserError(
                f"--mergers has {part!r} in {text!r}; expected key=value, such as budget=FixedBudget"
            )
        if key in ("budget.compression", "seed"):
            raise UserError(
                f"--mergers sets {key} in {text!r}; expected --compressions and --seeds to set it"
            )
        arguments.append((key, value))
    return MergerSpec(text, name, tuple(arguments))


def parse_compressions(text: str) -> list[float]:
    """Read ``--compressions``.

    Raises:
        UserError: one is no number, below 1, or given twice.
    """
    values: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise UserError(
                f"--compressions has {part!r}; expected numbers of at least 1, such as 1.5,2.37,4"
            ) from None
        if not 1.0 <= value < float("inf"):
            raise UserError(f"--compressions has {part}; expected at least 1 (tokens in per token out)")
        if value in values:
            raise UserError(f"--compressions has {part} twice; expected each once")
        values.append(value)
    return values


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what the comparison sets itself.

    Raises:
        UserError: an override is no option, or is set for each cell.
    """
    own = {
        "--run_dir": "--out",
        "--seed_everything": "--seeds",
        "--model.merger": "--mergers",
        "--model.init_args.merger": "--mergers",
        "--ckpt_path": "no such option: a cell goes on from its own checkpoint",
        "--fresh": "another --out",
    }
    if overrides and not overrides[0].startswith("--"):
        raise UserError(f"{overrides[0]!r} is no option; expected options such as --trainer.max_steps 300")
    for override in overrides:
        key = override.partition("=")[0]
        found = next((name for name in own if key == name or key.startswith(f"{name}.")), None)
        if found is not None:
            raise UserError(f"{key} is set for each cell by the comparison; use {own[found]}")
