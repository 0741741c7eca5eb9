"""Checkpoints that are either complete or not there, and that cannot run code (spec runtime.md, section 2)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qm_lightning.errors import UserError


def load_checkpoint_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything in it.

    Raises:
        UserError: missing, cut, or holding more than plain values.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; expected a file; check --ckpt_path")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the checkpoint {path} was refused ({first}); expected tensors and plain values, complete; "
            "take another checkpoint of the run"
        ) from error
    return content


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name in the same directory, flushes, renames; loads with ``weights_only``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save; a full disk keeps the old file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f"{target.name}.tmp.{os.getpid()}")
        try:
            with staging.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(target)
            descriptor = os.open(target.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        except OSError as error:
            kept = "the older file is kept" if target.exists() else "nothing was written"
            raise UserError(
                f"the checkpoint {target} could not be saved ({error}); {kept}; free some space"
            ) from error
        finally:
            staging.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load plain values only, whatever the caller asks."""
        return load_checkpoint_file(Path(path))
