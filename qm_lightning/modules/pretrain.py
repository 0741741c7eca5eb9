"""Pre-trains the small demo backbones, and saves them like any other Hugging Face model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qm_lightning.backbones.small import preprocessing_of, save_backbone
from qm_lightning.errors import UserError
from qm_lightning.losses import global_mean
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.shared_steps import SharedStepModule


class BackbonePretrainModule(SharedStepModule):
    """A small transformer trained from scratch on dense labels or on the next token.

    Args:
        architecture: a transformers model with fresh weights, e.g. ``qm_lightning.backbones.small.small_vit``.
        output_dir: folder that ``save_pretrained`` fills when training ends.
        objective: ``patch_labels``: classify every patch (batch key ``patch_labels`` [B,N]);
            ``next_token``: predict ``input_ids`` one step ahead (causal models).
        classes: number of patch classes, or of token ids.
        optimizer: the recipe.
    """

    def __init__(
        self,
        architecture: PreTrainedModel,
        output_dir: str,
        objective: Literal["patch_labels", "next_token"],
        classes: int,
        optimizer: OptimizerOptions | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.head = nn.Linear(int(architecture.config.hidden_size), classes)
        self.output_dir = Path(output_dir)
        self.objective = objective
        self.options = optimizer or OptimizerOptions()

    def _logits_and_labels(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = batch["inputs"]
        hidden = self.architecture(**inputs).last_hidden_state
        if self.objective == "next_token":
            labels = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
            return self.head(hidden[:, :-1]), labels
        if "patch_labels" not in batch:
            raise UserError(
                "the batch has no patch_labels, which objective=patch_labels trains on; prepare shards with them "
                "(python -m datamodules prepare image --source digits) or choose another objective"
            )
        labels = batch["patch_labels"]
        # Class and register tokens come first and have no label.
        return self.head(hidden[:, hidden.shape[1] - labels.shape[1] :]), labels

    def shared_step(self, batch: dict[str, Any], stage: str) -> Tensor:
        """Loss of one batch, with its measures logged."""
        logits, labels = self._logits_and_labels(batch)
        labels = labels.masked_fill(~batch["valid"][:, None], -100)
        counted = labels != -100
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100
        )
        loss = global_mean(total, counted.sum())
        correct = (logits.argmax(-1) == labels) & counted
        size = int(batch["valid"].shape[0])
        share = correct.sum() / counted.sum().clamp(min=1)
        self.log(f"{stage}/loss/total", loss, prog_bar=True, batch_size=size, sync_dist=stage != "train")
        self.log(f"{stage}/quality/nats", loss, batch_size=size, sync_dist=stage != "train")
        self.log(f"{stage}/quality/top1", share, prog_bar=True, batch_size=size, sync_dist=stage != "train")
        return loss

    def on_fit_end(self) -> None:
        """Save the backbone (without the head) under a temporary name, then rename."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            self.save_backbone()

    @torch.no_grad()
    def save_backbone(self) -> None:
        """Write ``output_dir`` so that ``HFBackbone(output_dir)`` loads it; an older one is replaced."""
        staging = self.output_dir.with_name(self.output_dir.name + ".tmp")
        shutil.rmtree(staging, ignore_errors=True)
        staging.parent.mkdir(parents=True, exist_ok=True)
        preprocessing = None if self.objective == "next_token" else preprocessing_of(self.architecture)
        save_backbone(self.architecture, staging, preprocessing)
        shutil.rmtree(self.output_dir, ignore_errors=True)
        staging.rename(self.output_dir)
