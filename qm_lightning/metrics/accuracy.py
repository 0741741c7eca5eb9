"""How often the likeliest token is the right one, and how often a whole sequence is."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenAccuracy(Metric):
    """Share of target tokens that are the likeliest one, teacher-forced (top-1)."""

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B,T,V] float.
            targets: [B,T] long, -100 = padding.
            valid: [B] bool, False = padding sample.
        """
        counted = (targets != -100) & valid[:, None]
        self.correct = self.correct + ((logits.argmax(dim=-1) == targets) & counted).sum()
        self.count = self.count + counted.sum()

    def compute(self) -> Tensor:
        """Share in [0,1]; not a number if there was none."""
        return self.correct.float() / self.count.float()


class ExactMatch(TokenAccuracy):
    """Share of samples whose whole target sequence greedy decoding reproduces.

    It reads teacher-forced logits: decoding greedily gives the target exactly if and only if every target
    token is the likeliest one after the target tokens before it.
    """

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch; arguments as in ``TokenAccuracy``. Samples without targets are left out."""
        real = targets != -100
        counted = real.any(dim=1) & valid
        whole = ((logits.argmax(dim=-1) == targets) | ~real).all(dim=1)
        self.correct = self.correct + (whole & counted).sum()
        self.count = self.count + counted.sum()
