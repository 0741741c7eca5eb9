"""Average pooling without looking at the content: contiguous groups of text, blocks of a grid."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qm_lightning.merging.assemble import merge_into, own_sizes
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.select import inverse
from qm_lightning.tokens import MergedTokens, Tokens


class UniformPool(BudgetMerger):
    """K groups whose sizes differ by one token at most: contiguous in text, near-square blocks on grids.

    Along each coordinate but the last the tokens are cut into about as many bands as make the blocks square,
    each band into blocks by the coordinates that follow, so that any K is reached.

    Args:
        budget: tokens left per sample; ``None``: ``FixedBudget()``.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__(budget)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """K averages, each named by its first member and ready with its last."""
        free, alone = tokens.mask, torch.zeros_like(tokens.mask)
        if tokens.protected is not None:
            free, alone = tokens.mask & ~tokens.protected, tokens.mask & tokens.protected
        counts = self.counts(tokens)
        block = blocks(tokens.positions, free, counts - alone.sum(1))
        # A group is named by its first member, a protected token by itself.
        index = torch.arange(free.shape[1], device=free.device).expand(free.shape)
        first = index.new_full(index.shape, free.shape[1]).scatter_reduce(
            1, block, index.masked_fill(~free, free.shape[1]), "amin"
        )
        parent = torch.where(alone, index, first.gather(1, block)).masked_fill(~tokens.mask, -1)
        return merge_into(tokens, parent, own_sizes(tokens), self.slots(tokens, counts), whole=False)


def blocks(positions: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Deal the tokens of a grid to ``counts`` blocks of near-equal size.

    Args:
        positions: [B,N,P] long.
        mask: [B,N] bool, the tokens to deal.
        counts: [B] long, blocks of each sample, at most its tokens.

    Returns:
        [B,N] long in [0,counts), 0 where ``mask`` is False.
    """
    axes = positions.shape[-1]
    far = positions.masked_fill(~mask.unsqueeze(-1), torch.iinfo(torch.long).min).amax(1)
    near = positions.masked_fill(~mask.unsqueeze(-1), torch.iinfo(torch.long).max).amin(1)
    extent = (far - near + 1).clamp(min=1)
    # Each token's slab: the blocks [first, first + parts) and the tokens that follow rank ``start``.
    parts = counts.clamp(min=1)[:, None].expand(mask.shape)
    size = mask.sum(1, keepdim=True).clamp(min=1).expand(mask.shape)
    first = start = torch.zeros_like(parts)
    for axis in range(axes - 1):
        rank = _rank(positions[..., axis], start, mask) - start
        share = rank * parts // size
        area = extent[:, axis:].double().prod(1, keepdim=True) / parts
        side = area ** (1.0 / (axes - axis))
        bands = (extent[:, axis : axis + 1] / side).round().long().clamp(min=1).minimum(parts)
        band = share * bands // parts
        low, high = _ceil_div(band * parts, bands), _ceil_div((band + 1) * parts, bands)
        begin, end = _ceil_div(low * size, parts), _ceil_div(high * size, parts)
        first, parts, start, size = first + low, high - low, start + begin, end - begin
    rank = _rank(positions[..., axes - 1], start, mask) - start
    return (first + rank * parts // size).masked_fill(~mask, 0)


def _ceil_div(a: Tensor, b: Tensor) -> Tensor:
    return -((-a) // b)


def _rank(coordinate: Tensor, slab: Tensor, mask: Tensor) -> Tensor:
    """Rank by slab, then by coordinate, then by index; padding last."""
    by_coordinate = coordinate.argsort(dim=1, stable=True)
    key = slab.masked_fill(~mask, torch.iinfo(torch.long).max).gather(1, by_coordinate)
    return inverse(by_coordinate.gather(1, key.argsort(dim=1, stable=True)))
