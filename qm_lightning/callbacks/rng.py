"""Random numbers as a pure function of (seed, rank, batch): a resume needs no stored generator state."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from what names a stream of random numbers."""
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class StatelessRNG(Callback):
    """Reseeds torch at every batch, on the CPU and on the rank's own device.

    So dropout and noise differ between ranks and repeat after a resume.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reseed from the number of batches trained in all epochs."""
        self._reseed(trainer, "train", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reseed from the optimizer step and the batch of the validation."""
        self._reseed(trainer, "validate", trainer.global_step, dataloader_idx, batch_idx)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reseed from the batch."""
        self._reseed(trainer, "test", dataloader_idx, batch_idx)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reseed from the batch."""
        self._reseed(trainer, "predict", dataloader_idx, batch_idx)

    def _reseed(self, trainer: Trainer, *where: object) -> None:
        seed = stream_seed(self.seed, trainer.global_rank, *where)
        # `torch.manual_seed` asks every kind of device that the machine might have, 1 ms a batch.
        torch.default_generator.manual_seed(seed)
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
