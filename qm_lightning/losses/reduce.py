"""A loss is a sum and a count; the count is that of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# A loss before its average: the sum over what is counted, and how many were counted; both scalars.
LossSum = tuple[Tensor, Tensor]


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide by the count over all ranks, so that DDP's averaged gradient is that of the true mean.

    DDP divides the sum of gradients by the number of ranks W; hence ``W * total / (sum of counts)``. The mean
    over ranks of what this returns is the true mean, too. One process with batch 2B equals two with batch B.
    Nothing leaves the device.

    Args:
        total: float, any shape; summed on this rank, with gradient.
        count: the same shape, any number type, on this rank.

    Returns:
        The shape of ``total``; 0 where nothing was counted on any rank.
    """
    everywhere = count.detach().to(torch.float64 if total.dtype == torch.float64 else torch.float32)
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        everywhere = everywhere.clone()
        dist.all_reduce(everywhere)
    return total * ranks / everywhere.clamp(min=1)
