"""What happens in the process of one cell; heavy imports come late, so that their errors go to its log."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from qm_lightning import cli

if TYPE_CHECKING:
    from qm_lightning.commands.train import QuickMergeCLI


def train_cell(command: Sequence[str], log: Path, threads: int) -> None:
    """Train and test a cell; leave with the exit code of ``train.py``.

    Args:
        command: ``fit`` and its options.
        log: file that takes all output.
        threads: of torch.
    """
    _settle(log, threads)
    print(f"\n$ python train.py {shlex.join(command)}    # and test", flush=True)
    from qm_lightning.comparing.cell_cli import CellCLI

    _run(command, CellCLI)


def measure_cell(command: Sequence[str], log: Path, threads: int) -> None:
    """Measure the cost of a tested cell again, with the machine to itself.

    Args:
        command: ``test`` and its options.
        log: file that takes all output.
        threads: of torch.
    """
    _settle(log, threads)
    print("\n$ measure the cost again", flush=True)
    from qm_lightning.comparing.cell_cli import CostOnlyCLI

    _run(command, CostOnlyCLI)


def _run(command: Sequence[str], kind: type[QuickMergeCLI]) -> None:
    from qm_lightning.commands import train

    code = cli.exit_code(lambda: train.main(command, kind))
    if code:
        sys.exit(code)


def _settle(log: Path, threads: int) -> None:
    """Write to the log, use so many threads, and do not outlive the comparison."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; the comparison asks with SIGTERM
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _follow(sentinel: int) -> None:
    """Stop cleanly, with a checkpoint, when the comparison itself was killed."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
