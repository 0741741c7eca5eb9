"""Random numbers of a step that follow from (seed, rank, step): the same after a resume, different on each rank."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StatelessRNG(Callback):
    """Seeds torch before every training batch, for dropout.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed from the batch's number."""
        key = f"{self.seed}/{trainer.global_rank}/{trainer.fit_loop.epoch_loop.total_batch_idx}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
