"""Ranks that resume from different steps would train on and then hang; this stops them first."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from qm_lightning.errors import UserError


class SameStart(Callback):
    """Compares the step that every rank starts from."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise on every rank if they differ."""
        if trainer.world_size == 1:
            return
        seen: list[tuple[int, str]] = [(0, "")] * trainer.world_size
        dist.all_gather_object(seen, (trainer.global_step, str(trainer.ckpt_path)))
        if len({step for step, _ in seen}) > 1:
            found = ", ".join(f"rank {i}: step {step} from {path}" for i, (step, path) in enumerate(seen))
            raise UserError(
                f"ranks start at different steps ({found}); put the run directory where every node sees it"
            )
