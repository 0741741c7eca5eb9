"""Finished runs, as their results.json tells them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qm_lightning.errors import UserError

CELL_FILE = "cell.json"  # what `compare` notes about a run: its label among others


@dataclass(frozen=True)
class Run:
    """One tested run.

    Attributes:
        path: the run's directory.
        experiment: the name that the configuration gives.
        method: the merger, with those of its arguments that tell it from other runs of the same merger.
        target: the compression asked for; ``None``: the method has none (NoMerge) or it is not known.
        seed: of the run; ``None``: not known.
        values: figures by name, those of ``metrics`` and of ``cost`` together.
        raw: results.json as it was read.
    """

    path: Path
    experiment: str
    method: str
    target: float | None
    seed: int | None
    values: dict[str, float]
    raw: dict[str, Any]


def find_results(directories: Sequence[Path]) -> list[Path]:
    """results.json of each directory, or of all directories below it.

    Raises:
        UserError: a directory does not exist, or holds no results.
    """
    found: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(
                f"{directory} is not a directory; expected a run directory or one that holds runs"
            )
        own = directory / "results.json"
        below = [own] if own.is_file() else sorted(directory.rglob("results.json"))
        if not below:
            raise UserError(
                f"no results.json in {directory} or below; expected a tested run: "
                f"python train.py test --config ... --run_dir {directory}"
            )
        found += below
    return list(dict.fromkeys(path.resolve() for path in found))


def read_runs(files: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read results; what cannot be read or was superseded is named, not fatal.

    Args:
        files: paths of results.json.

    Returns:
        The runs in a stable order, and one line per file that was left out.

    Raises:
        UserError: none could be read.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    for path in files:
        try:
            runs.append(_read(path))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            left_out.append(f"{path}: {' '.join(str(error).split())}")
    if not runs:
        raise UserError(f"no results could be read; {left_out[0]}; test the run again to write them anew")
    return _newest(_label(runs), left_out), left_out


def _newest(runs: list[Run], left_out: list[str]) -> list[Run]:
    """One run per method, compression and seed: a repetition is no further seed and would feign certainty."""
    chosen: dict[tuple[str, str, float | None, int | None], Run] = {}
    for run in sorted(runs, key=lambda run: (run.path / "results.json").stat().st_mtime_ns):
        key = (run.experiment, run.method, run.target, run.seed)
        if key in chosen:
            left_out.append(
                f"{chosen[key].path}: same method, compression and seed as {run.path}, which is newer"
            )
        chosen[key] = run
    kept = {id(run) for run in chosen.values()}
    return [run for run in runs if id(run) in kept]


def _read(path: Path) -> Run:
    raw = json.loads(path.read_text())
    figures = {**(raw.get("metrics") or {}), **(raw.get("cost") or {})}
    target = raw.get("compression_target")
    cell = path.with_name(CELL_FILE)
    label = json.loads(cell.read_text()).get("label", "") if cell.is_file() else ""
    return Run(
        path=path.parent,
        experiment=str(raw.get("experiment") or path.parent.parent.name),
        method=label,
        target=None if target is None else float(target),
        seed=raw.get("seed"),
        values={name: float(value) for name, value in figures.items() if isinstance(value, int | float)},
        raw=raw,
    )


def merger_name(run: Run) -> str:
    """Class name of the run's merger."""
    return str(run.raw.get("merger") or "unknown")


def _arguments(run: Run) -> dict[str, str]:
    """The merger's arguments but the compression, flat; those of the budget under ``budget.NAME``."""
    arguments = dict(run.raw.get("merger_args") or {})
    budget = arguments.pop("budget", None)
    flat = {name: json.dumps(value, sort_keys=True) for name, value in arguments.items()}
    name = run.raw.get("budget") or (budget if isinstance(budget, str) else None)
    if name:
        flat["budget"] = str(name)
    inner = (budget.get("init_args") or {}) if isinstance(budget, dict) else {}
    return flat | {
        f"budget.{key}": json.dumps(value, sort_keys=True)
        for key, value in inner.items()
        if key != "compression"
    }


def _label(runs: list[Run]) -> list[Run]:
    """Name the methods: the merger alone, or with the arguments in which its runs differ."""
    families: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        families.setdefault((run.experiment, merger_name(run)), []).append(run)
    named: list[Run] = []
    for (_, name), family in families.items():
        arguments = [_arguments(run) for run in family]
        differing = _differing(arguments)
        for run, own in zip(family, arguments, strict=True):
            shown = ", ".join(f"{key}={own[key].strip(chr(34))}" for key in differing if key in own)
            named.append(run if run.method else replace(run, method=f"{name}({shown})" if shown else name))
    return sorted(named, key=lambda r: (r.experiment, r.method, r.target or 0.0, r.seed or 0, str(r.path)))


def _differing(arguments: list[dict[str, str]]) -> list[str]:
    """Names with more than one value; a budget's own arguments count among runs of the same budget only."""
    names = sorted({name for own in arguments for name in own})
    differing = []
    for name in names:
        seen: dict[str | None, set[str | None]] = {}
        for own in arguments:
            inner = name.startswith("budget.")
            if not inner or name in own:
                seen.setdefault(own.get("budget") if inner else None, set()).add(own.get(name))
        if any(len(values) > 1 for values in seen.values()):
            differing.append(name)
    return differing
