"""Average pooling without looking at the content: contiguous groups of text, blocks of a grid."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qm_lightning.merging.base import Causality, Merger, assemble, width
from qm_lightning.merging.budget import Budget, FixedBudget
from qm_lightning.tokens import MergedTokens, Tokens


class UniformPool(Merger):
    """Groups of near-equal size: contiguous for text; on a grid, K rows-then-columns strips (blocks).

    On a grid the rows are cut into about sqrt(K) bands, and each band into as many blocks as make K in all.

    Args:
        budget: tokens kept per sample; default ``FixedBudget(2.37)``.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__()
        self.budget = budget or FixedBudget()

    def forward(self, tokens: Tokens) -> MergedTokens:
        """K averages, each named by its first member."""
        free = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
        kept = tokens.mask & ~free
        even = tokens.mask.float()
        counts = (self.budget(even, tokens.mask) - kept.sum(1)).clamp(min=1).minimum(free.sum(1))
        group = _blocks(tokens.positions, free, counts)
        # Each protected token is a group of its own, before the others.
        group = torch.where(kept, kept.long().cumsum(1) - 1, group + kept.sum(1, keepdim=True))
        group = group.masked_fill(~tokens.mask, -1)
        counts = counts + kept.sum(1)
        bound = (
            tokens.mask.shape[1] if tokens.protected is not None else self.budget.bound(tokens.mask.shape[1])
        )
        return _named(tokens, group, counts, width(counts, bound))


def _named(tokens: Tokens, group: Tensor, counts: Tensor, slots: int) -> MergedTokens:
    """Order groups by their first member, then average."""
    B, N = group.shape
    index = torch.arange(N, device=group.device).expand(B, N)
    slot = torch.where(group >= 0, group, slots)
    first = group.new_full((B, slots + 1), N).scatter_reduce(1, slot, index, "amin")[:, :slots]
    order = first.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(slots, device=order.device).expand_as(order)
    )
    assignment = torch.where(group >= 0, rank.gather(1, group.clamp(min=0)), -1)
    anchors = first.gather(1, order).clamp(max=N - 1)
    dtype = torch.promote_types(tokens.values.dtype, torch.float32)
    weights = tokens.mask.to(dtype) if tokens.size is None else tokens.size.to(dtype)
    return assemble(tokens, assignment, weights, anchors, counts, whole=False)


def _rank(values: Tensor) -> Tensor:
    return values.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def _blocks(positions: Tensor, free: Tensor, counts: Tensor) -> Tensor:
    """Group numbers [B,N] in [0,counts): equal shares of the tokens, first by the leading coordinates."""
    n = free.sum(1, keepdim=True)
    K = counts[:, None]
    P = positions.shape[-1]
    big = 2**40
    raster = _rank(torch.where(free, torch.arange(free.shape[1], device=free.device), big))
    if P == 1:
        return raster * K // n
    row, column = positions[..., -2], positions[..., -1]
    if P == 3:
        row = positions[..., 0] * (2**15) + row
    bands = K.double().sqrt().round().long().clamp(min=1)
    by_row = _rank(torch.where(free, row * 2**20 + column, big * 2**12))
    # K equal shares by row; a band is a run of shares, and its tokens are dealt to as many groups by column.
    band = (by_row * K // n) * bands // K
    low, high = -(-band * K // bands), -(-(band + 1) * K // bands)
    start, stop = -(-low * n // K), -(-high * n // K)
    by_band = _rank(torch.where(free, (band * 2**15 + column) * 2**32 + row, 2**62))
    return low + (by_band - start) * (high - low) // (stop - start).clamp(min=1)
