"""Sums and means over all processes of a job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(counts: Tensor) -> tuple[Tensor, int]:
    """Add up over all ranks, without gradient. Nothing leaves the device.

    Args:
        counts: any shape; it is not changed.

    Returns:
        The sum, and the number of ranks.
    """
    counts = counts.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return counts, 1
    counts = counts.clone()
    dist.all_reduce(counts)
    return counts, dist.get_world_size()


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide by the count over all ranks, so that DDP's averaged gradient is that of the true mean.

    DDP divides the sum of gradients by the number of ranks W; hence ``W * total / (sum of counts)``. The mean
    over ranks of what this returns is the true mean, too. One process with batch 2B equals two with batch B.

    Args:
        total: float, any shape; summed on this rank, with gradient.
        count: the same shape, any number type, on this rank.

    Returns:
        The shape of ``total``; 0 where nothing was counted on any rank.
    """
    dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
    everywhere, ranks = sum_over_ranks(count.to(dtype))
    return total * ranks / everywhere.clamp(min=1)
