"""Cross-entropy of the target tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qm_lightning.losses.reduce import LossSum


def target_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> LossSum:
    """Sum of the negative log-likelihood over target tokens.

    Args:
        logits: [B,T,V] float; computed in fp32 at least.
        targets: [B,T] long, -100 = padding.
        valid: [B] bool, False = padding sample.

    Returns:
        Nats, and the number of target tokens.
    """
    targets = targets.masked_fill(~valid[:, None], -100)
    precise = logits if logits.dtype.itemsize >= 4 else logits.float()
    total = F.cross_entropy(precise.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return (total, (targets != -100).sum())
