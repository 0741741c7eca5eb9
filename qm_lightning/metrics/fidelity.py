"""How much of the tokens merging loses."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RelativeError(Metric):
    """Mean over samples of ``||X - unmerge||^2 / ||X||^2`` (``qm_lightning.losses.relative_error``)."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, error: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            error: [B] float, relative error of each sample.
            valid: [B] bool, False = padding sample.
        """
        self.total = self.total + error.double().masked_fill(~valid, 0.0).sum()
        self.count = self.count + valid.sum()

    def compute(self) -> Tensor:
        """Mean relative error; not a number if there was no sample."""
        return (self.total / self.count).float()
