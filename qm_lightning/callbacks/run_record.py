"""Ties checkpoints to their run: a record in each file, and artifacts where they are asked for."""

from __future__ import annotations

import platform
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qm_lightning import __version__
from qm_lightning.runtime.find_checkpoint import RECORD_KEY
from qm_lightning.runtime.run_directory import RunDirectory
from qm_lightning.runtime.wandb_run import RunLogger

FORMAT = 1


class RunRecord(Callback):
    """Adds run id, resolved configuration, versions and a format number; plain values only.

    Args:
        run: the run's directory, whose config.yaml is copied.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._record: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record."""
        if not trainer.is_global_zero:
            return
        if self._record is None:
            self._record = {
                "format": FORMAT,
                "run_id": self.run.run_id,
                "config": self.run.written_config(),
                "versions": {
                    "qm_lightning": __version__,
                    "python": platform.python_version(),
                    "torch": str(torch.__version__),
                    "lightning": lightning.__version__,
                },
            }
        checkpoint[RECORD_KEY] = self._record


class CheckpointArtifacts(Callback):
    """Gives ``best`` and ``last`` to W&B when the training ends; asked for with ``--logger.artifacts true``.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the files over; ``last`` comes last, for W&B calls the newest version ``latest``."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                paths = [self.run.checkpoints / name for name in ("best.ckpt", "last.ckpt")]
                logger.keep_checkpoints(self.run.run_id, paths)
