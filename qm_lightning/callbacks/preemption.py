"""A signal on any rank: every rank leaves at the same step with a complete last.ckpt (spec runtime.md, section 2)."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

EXIT_CODE = 75  # EX_TEMPFAIL: never mistaken for success


class PreemptionGuard(Callback):
    """Saves and leaves with exit code 75 on SIGTERM or SIGUSR1.

    Args:
        directory: where last.ckpt goes.
        every: steps between agreements of the ranks on an accelerator; on the CPU every step.
    """

    def __init__(self, directory: Path, every: int = 10) -> None:
        self.directory = directory
        self.every = every
        self._asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which run a collective inside the handler; it restores the originals."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._mark)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave together, after a whole optimizer step."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.strategy.root_device.type != "cpu" and (batch_idx + 1) % self.every:
            return
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer.save_checkpoint(self.directory / "last.ckpt")
            print(f"stopped by a signal at step {trainer.global_step}; go on with --ckpt_path last")
            raise SystemExit(EXIT_CODE)
