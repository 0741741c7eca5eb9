"""Tokens kept per sample: mean and percentiles, from a histogram that ranks can add up."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from qm_lightning.errors import UserError


class TokensKept(Metric):
    """Mean number of merged tokens per sample.

    Args:
        max_tokens: largest number with a bin of its own; more are counted as ``max_tokens`` in percentiles
            (the mean is exact always).
    """

    higher_is_better = None
    full_state_update = False
    histogram: Tensor
    total: Tensor

    def __init__(self, max_tokens: int = 4096) -> None:
        super().__init__()
        self.add_state("histogram", torch.zeros(max_tokens + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, kept: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            kept: [B] long, merged tokens per sample.
            valid: [B] bool, False = padding sample.
        """
        bins = kept.clamp(max=self.histogram.shape[0] - 1)
        self.histogram = self.histogram.scatter_add(0, bins, valid.long())
        self.total = self.total + kept.masked_fill(~valid, 0).sum()

    def compute(self) -> Tensor:
        """Tokens per sample; not a number if there was none."""
        return self.total.float() / self.histogram.sum().float()


class TokensKeptPercentile(TokensKept):
    """The smallest number of tokens that at least a share of the samples does not exceed.

    Args:
        share: 0.05 for the 5th percentile.
        max_tokens: as in ``TokensKept``.

    Raises:
        UserError: ``share`` is outside (0, 1].
    """

    def __init__(self, share: float, max_tokens: int = 4096) -> None:
        super().__init__(max_tokens)
        if not 0.0 < share <= 1.0:
            raise UserError(f"percentile share={share}; expected a share in (0, 1], e.g. 0.95; mend it")
        self.share = share

    def compute(self) -> Tensor:
        """Tokens per sample; 0 if there was no sample."""
        cumulative = self.histogram.cumsum(dim=0)
        # fp64 and a hair less: 0.95 x 20 must be 19, not the next float above it.
        wanted = cumulative[-1].double() * self.share - 1e-9
        return torch.searchsorted(cumulative.double(), wanted.reshape(1)).squeeze(0).float()
