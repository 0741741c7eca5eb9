"""Which checkpoint ``last``, ``best`` or a path means: the newest that loads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import read_checkpoint, refuse_address

# Where a checkpoint keeps what is ours: run id, configuration, versions.
RECORD_KEY = "qm_lightning"


@dataclass(frozen=True)
class StoredRun:
    """A checkpoint that loads, and what it says about its run.

    Attributes:
        path: the file.
        step: optimizer steps behind it.
        record: run id, configuration and versions; empty for a checkpoint that another program wrote.
    """

    path: Path
    step: int
    record: dict[str, Any]


def resolve_checkpoint(run_dir: Path, wanted: str) -> StoredRun:
    """Find the checkpoint to load. To be called on rank 0, whose answer holds for all.

    Args:
        run_dir: the run's directory.
        wanted: ``last`` (the newest step that loads, whatever its name), ``best``, or a path.

    Returns:
        The checkpoint, read completely once.

    Raises:
        UserError: none that loads, an address, or a file that wants to run code.
    """
    refuse_address(wanted)
    if wanted == "best":
        return _whole(run_dir / "checkpoints" / "best.ckpt")
    if wanted != "last":
        return _whole(Path(wanted))
    for candidate in _newest_first(run_dir / "checkpoints"):
        try:
            return _whole(candidate)
        except UserError as error:
            _passed_over(error)
    raise UserError(
        f"no checkpoint in {run_dir / 'checkpoints'} loads; expected last.ckpt or step_*.ckpt; "
        "train it first (fit without --ckpt_path starts from zero)"
    )


def _whole(path: Path) -> StoredRun:
    checkpoint = read_checkpoint(path)
    record = checkpoint.get(RECORD_KEY)
    return StoredRun(path, int(checkpoint.get("global_step", 0)), record if isinstance(record, dict) else {})


def _newest_first(directory: Path) -> list[Path]:
    """Checkpoints by optimizer step, not by file time: copies of a run lose their times."""
    steps: list[tuple[int, bool, Path]] = []
    for path in [*directory.glob("step_*.ckpt"), directory / "last.ckpt"]:
        if not path.is_file():
            continue
        try:
            step = int(read_checkpoint(path, lazily=True).get("global_step", 0))
        except UserError as error:
            _passed_over(error)
            continue
        steps.append((step, path.name == "last.ckpt", path))
    return [path for *_, path in sorted(steps, reverse=True)]


def _passed_over(error: UserError) -> None:
    print(f"warning: passed over: {error}", file=sys.stderr, flush=True)


def has_history(run_dir: Path) -> bool:
    """Whether a training has left anything in the directory."""
    return any((run_dir / "checkpoints").glob("*.ckpt")) or (run_dir / "metrics.csv").exists()
