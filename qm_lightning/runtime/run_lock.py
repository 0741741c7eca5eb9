"""One training at a time in a run's directory."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from qm_lightning.errors import UserError

LOCK = ".lock"
PATIENCE = 20.0  # seconds: a process that was told to leave may still be saving

_held: dict[Path, IO[str]] = {}


def hold(directory: Path, patience: float = PATIENCE) -> None:
    """Take the directory for as long as this process lives; a killed process gives it back.

    A POSIX record lock: worker processes do not inherit it, and it holds between the nodes of a shared file system
    that knows locks. Where the file system knows none, nothing is held.

    Args:
        directory: of the run; it exists.
        patience: seconds to wait for another process to leave.

    Raises:
        UserError: another training works there.
    """
    key = directory.resolve()
    if key in _held:
        return
    file = (directory / LOCK).open("a+")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                file.close()
                raise UserError(
                    f"another training works in {directory}; expected one at a time; wait for it, stop it, or choose "
                    "another --run_dir"
                ) from None
            time.sleep(0.2)
            continue
        except OSError:  # this file system has no locks
            file.close()
            return
        _held[key] = file
        return
