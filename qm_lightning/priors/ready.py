"""Which merged tokens a prediction may read."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.tokens import MergedTokens


def ready_before(merged: MergedTokens, rows: Tensor) -> Tensor:
    """How many merged tokens each row may read: those that are ready before it.

    Args:
        merged: ``ready`` does not fall within a sample.
        rows: [B,R] long, index of the token that each row predicts.

    Returns:
        [B,R] long in [0,K].
    """
    never = torch.iinfo(torch.long).max
    ready = merged.ready.masked_fill(~merged.mask, never)
    return torch.searchsorted(ready.contiguous(), rows.contiguous())
