"""``python train.py compare``: mergers x compressions x seeds on the same work."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from qm_lightning.commands.report import OneLineParser
from qm_lightning.comparing.specs import check_overrides, parse_compressions, parse_specs
from qm_lightning.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from rich.console import Console

    from qm_lightning.comparing.cells import Cell
    from qm_lightning.comparing.schedule import Failure

# Settings of a cell that a user may still override: one log file, one W&B table at the end.
QUIET = ("--logger.wandb", "false", "--trainer.enable_progress_bar", "false")
FAILED = 1
EXAMPLE = """\
example:
  python train.py compare --config configs/experiment/image.yaml --seeds 3 --compressions 1.5,2.37,4,8 \\
      --mergers "NoMerge,QuickMerge,QuickMerge(budget=FixedBudget),ToMe" --jobs 2 --trainer.max_steps 300

Any further option of train.py fit is passed on to each run. The same command goes on where it was stopped."""


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = OneLineParser(
        prog="python train.py compare",
        description="Train and test each merger at each compression with each seed: same data order, same "
        "prior, same steps. Ends with a table, CSV, plots and a page.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--config", action="append", required=True, metavar="YAML", help="experiment; may be repeated"
    )
    options.add_argument("--mergers", required=True, help="NAME or NAME(key=value,...), separated by commas")
    options.add_argument(
        "--compressions", default="2.37", help="tokens in per token out (default: %(default)s)"
    )
    options.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: %(default)s)")
    options.add_argument(
        "--out", type=Path, help="directory of the runs and the report (default: runs/compare/NAME)"
    )
    options.add_argument(
        "--jobs", type=int, default=1, help="cells at a time, sharing the cores (default: %(default)s)"
    )
    options.add_argument(
        "--measure",
        action="store_true",
        help="measure the cost of every cell again, one at a time, finished or not",
    )
    return options


def main(argv: Sequence[str]) -> int:
    """Run the comparison.

    Args:
        argv: the options after the verb.

    Returns:
        0, 1 if a cell failed, 130 if it was stopped; mistakes raise ``UserError``.
    """
    options, overrides = parser().parse_known_args(argv)
    specs = parse_specs(options.mergers)
    compressions = parse_compressions(options.compressions)
    check_overrides(overrides)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; expected at least 1")

    _import_aside()
    from qm_lightning import terminal
    from qm_lightning.comparing.cells import make_cells
    from qm_lightning.comparing.plan import check_backbone, common_parts, make_plans, resolve

    files = [item for path in options.config for item in ("--config", path)]
    config = resolve([*files, *overrides])
    plans = make_plans(specs, compressions, config)
    check_backbone(plans, config)
    out = options.out or Path("runs") / "compare" / config["name"]
    cells = make_cells(plans, options.seeds, [*files, *QUIET, *overrides], out, common_parts(config))
    console = terminal.console()
    with _alone_in(out), _stop_on_sigterm():
        try:
            failures = _train(cells, options.jobs, config["trainer"]["max_steps"], console)
            failures += _measure([c for c in cells if c.finished()], options.measure, console)
        except KeyboardInterrupt:
            done = sum(cell.finished() for cell in cells)
            console.print(
                f"stopped: {done} of {len(cells)} cells are finished; the same command goes on from here"
            )
            return INTERRUPTED
        _conclude(cells, failures, out, config["logger"], console)
    return FAILED if failures else 0


# What the process of a cell imports. Those that are not installed are passed over.
PRELOADED = (
    "qm_lightning.comparing.cell_cli",
    "qm_lightning.comparing.worker",
    "qm_lightning.pictures",
    "PIL.Image",
    "s3fs",  # Lightning asks it whether checkpoints lie in an object store
)


def _context() -> ForkServerContext:
    """Processes forked from one that has imported everything: fresh, and at no start-up cost."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _import_aside() -> None:
    """Let the process that cells are forked from do its imports while this one does its own."""
    from multiprocessing import forkserver

    _context()
    forkserver.ensure_running()


def _threads(jobs: int) -> int:
    """Threads of each of ``jobs`` processes: its share of the cores, or fewer if ``OMP_NUM_THREADS`` says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // jobs)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


def _train(cells: Sequence[Cell], jobs: int, steps: int, console: Console) -> list[Failure]:
    from multiprocessing.process import BaseProcess

    from qm_lightning.comparing import worker
    from qm_lightning.comparing.schedule import run_cells

    todo = [cell for cell in cells if not cell.finished()]
    console.print(
        f"{len(cells)} cells: {len(cells) - len(todo)} finished, {len(todo)} to run", highlight=False
    )
    for cell in todo:
        cell.prepare()
    context = _context()

    def start(cell: Cell) -> BaseProcess:
        process = context.Process(
            target=worker.train_cell, args=(cell.arguments("fit"), cell.log, _threads(jobs))
        )
        process.start()
        return process

    def finish(cell: Cell) -> str:
        cell.write_note(alone=jobs == 1)
        for checkpoint in (cell.path / "checkpoints").glob("step_*.ckpt"):
            checkpoint.unlink()  # last and best stay; a comparison has many cells
        return cell.result()

    return run_cells(todo, jobs, start, finish, console=console, title="cells", steps=steps) if todo else []


def _measure(cells: Sequence[Cell], everything: bool, console: Console) -> list[Failure]:
    """Measure costs one cell at a time: those taken while other cells ran say little."""
    from multiprocessing.process import BaseProcess

    from qm_lightning.comparing import worker
    from qm_lightning.comparing.schedule import run_cells

    todo = [cell for cell in cells if everything or not cell.note().get("alone")]
    context = _context()

    def start(cell: Cell) -> BaseProcess:
        process = context.Process(
            target=worker.measure_cell, args=(cell.arguments("test"), cell.log, _threads(1))
        )
        process.start()
        return process

    def finish(cell: Cell) -> str:
        cell.write_note(alone=True)
        return cell.cost()

    return run_cells(todo, 1, start, finish, console=console, title="costs", steps=1) if todo else []


def _conclude(
    cells: Sequence[Cell], failures: Sequence[Failure], out: Path, logger: dict[str, object], console: Console
) -> None:
    """Report on what finished; say what did not, and why."""
    from rich.markup import escape

    from qm_lightning.comparing.publish import publish
    from qm_lightning.report import print_report, write_report

    finished = [cell.path for cell in cells if cell.finished()]
    if finished:
        report = write_report(finished, out / "report")
        where = publish(report, out, logger)
        print_report(report, console)
        if where:
            console.print(escape(where), highlight=False, soft_wrap=True)
    for failure in failures:
        console.print(f"\n[red]failed[/] {escape(failure.cell.name)}: {failure.reason}", highlight=False)
        for line in failure.lines:
            console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        console.print(f"    whole log: {escape(str(failure.cell.log))}", highlight=False, soft_wrap=True)
    if failures:
        console.print(f"{len(failures)} of {len(cells)} cells failed; the same command tries them again")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Refuse to work in a directory in which another comparison works."""
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}; choose another place") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another comparison works in {out}; wait for it, or choose another --out"
            ) from error
        yield


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: cells save, and the same command goes on later."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
