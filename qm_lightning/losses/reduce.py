"""A loss is a sum and a count; the count is that of all ranks."""

from __future__ import annotations

from torch import Tensor

from qm_lightning.ranks import global_mean

__all__ = ["LossSum", "global_mean"]

# A loss before its average: the sum over what is counted, and how many were counted; both scalars.
LossSum = tuple[Tensor, Tensor]
