"""Runs the cells of a comparison, some at a time, and says how they fare."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qm_lightning.comparing.cells import Cell
from qm_lightning.reporting.curves import read_curves
from qm_lightning.reporting.plots import TRAIN_LOSS, VALIDATION_LOSS

POLL = 1.0  # seconds between two looks at the running cells
GRACE = 30.0  # seconds that a cell has to save its checkpoint when the comparison is stopped
LAST_LINES = 12


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish.

    Attributes:
        cell: which.
        reason: exit code in words.
        lines: the end of its log.
    """

    cell: Cell
    reason: str
    lines: list[str]


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    started: float
    task: TaskID


def progress_of(cell: Cell) -> tuple[int, str]:
    """The last step that a running cell logged, and its quality so far."""
    curves = read_curves(cell.path, (TRAIN_LOSS, VALIDATION_LOSS))
    step = max((int(curve[-1][0]) for curve in curves.values()), default=0)
    for name, what in ((VALIDATION_LOSS, "val"), (TRAIN_LOSS, "train")):
        if name in curves:
            return step, f"{what} {curves[name][-1][1]:.3f} nats"
    return step, ""


def failure_of(cell: Cell, code: int | None) -> Failure:
    """Why a cell ended early, from its exit code and its log."""
    if code is not None and code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            reason += " (out of memory?)"
    elif code == 0:
        reason = "left no results.json"
    else:
        reason = f"exit code {code}"
    try:
        lines = cell.log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return Failure(cell, reason, [line for line in lines if line.strip()][-LAST_LINES:])


def run_cells(
    cells: Sequence[Cell],
    jobs: int,
    start: Callable[[Cell], BaseProcess],
    finish: Callable[[Cell], str],
    *,
    console: Console,
    title: str,
    steps: int,
) -> list[Failure]:
    """Run all cells; one that fails does not stop the others.

    Args:
        cells: in the order in which they start.
        jobs: cells at a time.
        start: starts a cell's process.
        finish: called when a cell's process left with 0; returns a word on its result.
        console: for progress and messages.
        title: of the bar over all cells.
        steps: training steps of a cell, for its own bar.

    Returns:
        The failures.

    Raises:
        KeyboardInterrupt: after the running cells were stopped.
    """
    queue, running, failures = list(cells), list[_Running](), list[Failure]()
    with _progress(console) as progress:
        whole = progress.add_task(title, total=len(cells), note="")
        try:
            while queue or running:
                while queue and len(running) < jobs:
                    cell = queue.pop(0)
                    task = progress.add_task(f"  {escape(cell.name)}", total=steps, note="")
                    running.append(_Running(cell, start(cell), time.monotonic(), task))
                wait([r.process.sentinel for r in running], timeout=POLL)
                for r in [r for r in running if not r.process.is_alive()]:
                    running.remove(r)
                    r.process.join()
                    progress.remove_task(r.task)
                    failures += _conclude(r, finish, progress.console)
                    progress.advance(whole)
                for r in running:
                    step, note = progress_of(r.cell)
                    progress.update(r.task, completed=step, note=note)
        except BaseException:
            _stop(running)
            raise
    return failures


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


def _conclude(running: _Running, finish: Callable[[Cell], str], console: Console) -> list[Failure]:
    cell, seconds = running.cell, time.monotonic() - running.started
    if running.process.exitcode == 0 and (cell.path / "results.json").is_file():
        console.print(
            f"[green]done[/]    {escape(cell.name)}: {finish(cell)}, {seconds:.0f} s", highlight=False
        )
        return []
    failure = failure_of(cell, running.process.exitcode)
    console.print(
        f"[red]failed[/]  {escape(cell.name)}: {failure.reason}; {escape(str(cell.log))}", highlight=False
    )
    return [failure]


def _stop(running: Sequence[_Running]) -> None:
    """Ask the cells to save and leave; kill those that do not."""
    for r in running:
        r.process.terminate()
    deadline = time.monotonic() + GRACE
    for r in running:
        r.process.join(max(0.0, deadline - time.monotonic()))
        if r.process.is_alive():
            r.process.kill()
            r.process.join()
