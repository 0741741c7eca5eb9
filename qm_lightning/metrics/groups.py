"""The shape of groups: do they overlap in time, and how far do they reach? (reduction.md, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def group_extents(assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """First and last member of each group.

    Args:
        assignment: [B,N] long in [0,K), -1 = dropped or padding.
        groups: K.

    Returns:
        Two [B,K] long tensors; N and -1 for a group without members.
    """
    batch, tokens = assignment.shape
    # Dropped tokens go to a column of their own, which is cut off.
    column = assignment.masked_fill(assignment < 0, groups)
    index = torch.arange(tokens, device=assignment.device).expand_as(assignment)
    first = index.new_full((batch, groups + 1), tokens).scatter_reduce(1, column, index, "amin")
    last = index.new_full((batch, groups + 1), -1).scatter_reduce(1, column, index, "amax")
    return first[:, :-1], last[:, :-1]


class OverlapRate(Metric):
    """Share of neighbouring groups of which the later one begins before the earlier one ends.

    0 for every merger of contiguous spans; more than 0 for groups that reach across the sequence.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, assignment: Tensor, mask: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            assignment: [B,N] long in [0,K), -1 = dropped or padding.
            mask: [B,K] bool, True = real merged token.
            valid: [B] bool, False = padding sample.
        """
        first, last = group_extents(assignment, mask.shape[1])
        pairs = mask[:, 1:] & mask[:, :-1] & valid[:, None]
        self.total = self.total + ((first[:, 1:] < last[:, :-1]) & pairs).sum()
        self.count = self.count + pairs.sum()

    def compute(self) -> Tensor:
        """Share in [0,1]; 0 if no sample has two groups."""
        return self.total.float() / self.count.clamp(min=1).float()


class MeanSpan(OverlapRate):
    """Mean of ``last member - first member + 1`` over groups, in tokens."""

    def update(self, assignment: Tensor, mask: Tensor, valid: Tensor) -> None:
        """Add a batch; arguments as in ``OverlapRate``."""
        first, last = group_extents(assignment, mask.shape[1])
        counted = mask & valid[:, None]
        self.total = self.total + (last - first + 1).masked_fill(~counted, 0).sum()
        self.count = self.count + counted.sum()
