"""Refuses a training whose ranks start at different steps."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from qm_lightning.errors import UserError
from qm_lightning.runtime.rendezvous import gather


class SameStart(Callback):
    """Compares step and checkpoint of all ranks before the first batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``UserError`` on every rank if they differ."""
        starts = gather((trainer.global_step, str(trainer.ckpt_path)))
        if len({step for step, _ in starts}) > 1:
            found = ", ".join(
                f"rank {rank} at step {step} from {path}" for rank, (step, path) in enumerate(starts)
            )
            raise UserError(
                f"the ranks start at different steps ({found}); expected one step; "
                "put the run directory on storage that every node sees"
            )
