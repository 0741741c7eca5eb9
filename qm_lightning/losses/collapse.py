"""Watches whether merged tokens become all alike."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.tokens import MergedTokens


@torch.no_grad()
def collapse_variance(merged: MergedTokens, valid: Tensor) -> Tensor:
    """Variance of merged tokens within their sample, averaged over channels and samples.

    A merger that learns could make its own tokens easy to predict by making them equal; then this falls to
    zero. It is logged, and is no loss.

    Args:
        merged: K merged tokens.
        valid: [B] bool, False = padding sample.

    Returns:
        Scalar >= 0, unbiased; 0 if no sample has two tokens.
    """
    keep = (merged.mask & valid[:, None]).unsqueeze(-1)
    values = merged.values.float().masked_fill(~keep, 0.0)
    counts = keep.sum(dim=1)
    mean = values.sum(dim=1) / counts.clamp(min=1)
    squares = (values - mean.unsqueeze(1)).masked_fill(~keep, 0.0).square().sum(dim=(0, 1))
    return (squares / (counts - 1).clamp(min=0).sum().clamp(min=1)).mean()
