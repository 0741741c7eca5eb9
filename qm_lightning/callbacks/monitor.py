"""Watches loss, gradients, learning rate and budget."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qm_lightning.callbacks.loop_state import logs_now
from qm_lightning.errors import UserError
from qm_lightning.runtime.rendezvous import cpu_group


class TrainingMonitor(Callback):
    """Logs gradient norm, learning rate and the budget's controller; stops every rank at a loss that is not finite.

    Args:
        every: batches between two looks at the loss; ``None``: 1 on the CPU, 10 on accelerators, where a look
            waits for the device.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self._bad: Tensor | None = None
        self._norm: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a clean record."""
        self._bad = torch.zeros((), dtype=torch.bool, device=trainer.strategy.root_device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradient before clipping, at batches that are logged."""
        if logs_now(trainer):
            gradients = [
                p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and look at the loss."""
        if self._norm is not None:
            norm = self._norm.full_tensor() if hasattr(self._norm, "full_tensor") else self._norm
            pl_module.log("train/gradient_norm", norm, batch_size=1)
            pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
            rho = getattr(getattr(getattr(pl_module, "merger", None), "budget", None), "rho", None)
            if isinstance(rho, Tensor):
                pl_module.log("train/budget/rho", rho.detach().float(), batch_size=1)
            self._norm = None
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if self._bad is None or not isinstance(loss, Tensor):
            return
        self._bad |= ~torch.isfinite(loss.detach())
        every = self.every or (1 if self._bad.device.type == "cpu" else 10)
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0:
            self._stop_if_bad(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """No checkpoint of a training that has failed."""
        self._stop_if_bad(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the batches since the last look."""
        self._stop_if_bad(trainer)

    def _stop_if_bad(self, trainer: Trainer) -> None:
        if self._bad is None:
            return
        bad = self._bad.to("cpu", torch.int64)
        group = cpu_group()
        if group is not None:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
        if int(bad):
            self._bad = None
            raise UserError(
                f"the loss is not finite at step {trainer.global_step}; expected a number; go on from an "
                "earlier checkpoint with a lower learning rate or gradient clipping "
                "(--trainer.gradient_clip_val 1.0), and look at the data"
            )
