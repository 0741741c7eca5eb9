"""Likelihood of target tokens, in nats, in bits and as perplexity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from qm_lightning.losses import target_loss


class NatsPerToken(Metric):
    """Mean negative log-likelihood of a target token, end token included.

    States are sums (nats, tokens), so uneven batches and ranks weigh by their tokens.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B,T,V] float.
            targets: [B,T] long, -100 = padding.
            valid: [B] bool, False = padding sample.
        """
        total, count = target_loss(logits, targets, valid)
        self.total = self.total + total.double()
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Nats per token; not a number if there was none."""
        return (self.total / self.count).float()


class BitsPerToken(NatsPerToken):
    """The same in bits: bits per byte where targets are bytes."""

    def compute(self) -> Tensor:
        """Bits per token."""
        return (self.total / self.count / math.log(2)).float()


class Perplexity(NatsPerToken):
    """``exp`` of the mean over all tokens (never a mean of perplexities)."""

    def compute(self) -> Tensor:
        """Perplexity per token."""
        return (self.total / self.count).exp().float()
