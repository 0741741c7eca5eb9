"""Stand-ins for the processes of a comparison, importable by a forked worker."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from qm_lightning.comparing.cells import Cell
from qm_lightning.comparing.specs import MergerSpec


def cell(root: Path, name: str, digest: str = "d") -> Cell:
    """A cell of its own merger."""
    return Cell(MergerSpec(name, name), 4.0, 0, root / name, ("--config", "x.yaml"), digest)


def succeed(path: Path) -> None:
    """Leaves what a tested run leaves."""
    content = {"metrics": {"quality/nats": 0.125, "tokens/kept_mean": 16.0}, "cost": {"ms_per_sample": 1.5}}
    (path / "results.json").write_text(json.dumps(content))


def fail(path: Path) -> None:
    """Prints to its log and leaves with 3."""
    (path / "log.txt").write_text("\n".join(f"line {i}" for i in range(50)) + "\n\n")
    sys.exit(3)


def die(path: Path) -> None:
    """Is killed, as by a machine without memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def forget(path: Path) -> None:
    """Leaves with 0 and no results."""


def meet(path: Path) -> None:
    """Waits until two cells run at the same time, then succeeds."""
    (path / "here").write_text("")
    deadline = time.monotonic() + 20
    while len(list(path.parent.glob("*/here"))) < 2:
        if time.monotonic() > deadline:
            sys.exit(9)
        time.sleep(0.01)
    succeed(path)


def wait_for_sigterm(path: Path) -> None:
    """Runs until it is asked to stop, then says that it was."""

    def stop(number: int, frame: object) -> None:
        (path / "stopped").write_text("")
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    (path / "here").write_text("")
    while True:
        time.sleep(0.01)
