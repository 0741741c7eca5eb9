"""For modules whose training, validation and test steps are one computation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from qm_lightning.modules.optim import OptimizerOptions, build_optimizer


class SharedStepModule(LightningModule):
    """Subclasses implement ``shared_step`` and set ``options``, the recipe."""

    options: OptimizerOptions

    def shared_step(self, batch: dict[str, Any], stage: str) -> Tensor:
        """Loss of one batch, logged under ``stage/...``."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self.shared_step(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss on validation shards."""
        self.shared_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss on test shards."""
        self.shared_step(batch, "test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warm-up and cosine over ``trainer.max_steps``."""
        return build_optimizer(self.named_parameters(), self.options, self.trainer.max_steps)
