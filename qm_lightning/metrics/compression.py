"""How many tokens went in for each that came out."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Compression(Metric):
    """Sum of valid tokens over sum of merged tokens (not the mean of each sample's ratio)."""

    higher_is_better = True
    full_state_update = False
    before: Tensor
    after: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("before", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("after", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, counts: Tensor, kept: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            counts: [B] long, valid tokens per sample.
            kept: [B] long, merged tokens per sample.
            valid: [B] bool, False = padding sample.
        """
        self.before = self.before + counts.masked_fill(~valid, 0).sum()
        self.after = self.after + kept.masked_fill(~valid, 0).sum()

    def compute(self) -> Tensor:
        """Tokens in per token out; not a number if there was none."""
        return self.before.float() / self.after.float()
