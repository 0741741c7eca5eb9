"""Stops a training whose loss is no number, before it spoils a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qm_lightning.errors import UserError


class NaNGuard(Callback):
    """Raises ``UserError`` on every rank when a loss on any rank is NaN or infinite.

    The loss of step t is looked at in step t+``every``, so that an accelerator is not stalled in each step.

    Args:
        every: steps between looks on an accelerator; on the CPU each step is looked at.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self._bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the loss was finite."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if loss.device.type == "cpu" or (batch_idx + 1) % self.every == 0:
            if trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False):
                raise UserError(
                    f"the training loss is not finite at step {trainer.global_step}; expected a number; lower the "
                    "learning rate, clip gradients (--trainer.gradient_clip_val 1.0) or look at the data"
                )
            self._bad = None
