"""Learns which tokens of a picture a word speaks of, from pictures and their texts alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.words import save_words
from qm_lightning.errors import UserError
from qm_lightning.losses import global_mean
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.shared_steps import SharedStepModule
from qm_lightning.runtime.frozen import FrozenBackboneMixin


class WordVectorsModule(FrozenBackboneMixin, SharedStepModule):
    """Word vectors in the space of a frozen picture backbone, by learning from multiple instances (ours).

    A word is likely in the text if at least one token of the picture is like its vector: the soft maximum of the
    scaled cosines, plus the word's own bias, is a logit, and the loss is binary cross-entropy over all words. Nobody
    says which token it is. A hard maximum gives gradient to one token only and hardly gets off the ground.

    Args:
        backbone: frozen picture encoder.
        output_dir: folder that the vectors are saved to when training ends.
        words: number of ids that a text can hold.
        optimizer: the recipe.
    """

    def __init__(
        self,
        backbone: HFBackbone,
        output_dir: str,
        words: int = 257,
        optimizer: OptimizerOptions | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_dir = Path(output_dir)
        self.table = nn.Parameter(torch.randn(words, backbone.hidden_size))
        self.bias = nn.Parameter(torch.full((words,), -3.0))  # most words are not in a text
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.options = optimizer or OptimizerOptions()

    def likeness(self, batch: dict[str, Any]) -> Tensor:
        """Cosine of every token with every word, [B,N,V]; -1 for padding."""
        tokens = self.backbone(batch["inputs"], statistics=False)
        unit = F.normalize(tokens.values.to(self.table.dtype), dim=-1)
        cosine = unit @ F.normalize(self.table, dim=-1).T
        return cosine.masked_fill(~tokens.mask.unsqueeze(-1), -1.0)

    def shared_step(self, batch: dict[str, Any], stage: str) -> Tensor:
        """Loss of one batch, with its measures logged."""
        if "context" not in batch:
            raise UserError(
                "the batch has no context; expected pictures with questions, as a PairedDataModule gives them; prepare "
                "shards with question.txt"
            )
        likeness = self.likeness(batch) * self.log_scale.exp()
        logits = likeness.logsumexp(dim=1) - math.log(likeness.shape[1]) + self.bias
        ids, real = batch["context"]["input_ids"], batch["context"]["attention_mask"]
        present = torch.zeros_like(logits).scatter_reduce_(1, ids, real.to(logits.dtype), "amax")
        each = F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(dim=1)
        loss = global_mean(each.masked_fill(~batch["valid"], 0.0).sum(), batch["valid"].sum())
        size = int(batch["valid"].shape[0])
        self.log(f"{stage}/loss/total", loss, prog_bar=True, batch_size=size, sync_dist=stage != "train")
        self.log(f"{stage}/quality/nats", loss, batch_size=size, sync_dist=stage != "train")
        return loss

    def on_fit_end(self) -> None:
        """Save the vectors."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            save_words(self.table, self.output_dir)
