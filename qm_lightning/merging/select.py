"""Choosing tokens by score, in masked batches."""

from __future__ import annotations

import torch
from torch import Tensor


def width(counts: Tensor, bound: int) -> int:
    """Slots that hold ``counts`` [B]: the largest on the CPU; elsewhere the bound, since reading stalls."""
    return int(counts.max()) if counts.device.type == "cpu" else bound


def inverse(order: Tensor) -> Tensor:
    """The permutations that undo those in the rows of ``order``, [B,N] long: the rank of each item."""
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)


def ranks(scores: Tensor, mask: Tensor, protected: Tensor | None = None) -> Tensor:
    """Place of each token when the highest score comes first.

    Protected tokens come before all others, padding after them, NaN last among the valid; the lowest index
    wins ties. Scores are compared as float32 or better, because in bfloat16 they tie.

    Args:
        scores: [B,N] float.
        mask: [B,N] bool, valid tokens.
        protected: [B,N] bool.

    Returns:
        [B,N] long, 0 for the first.
    """
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    least = torch.finfo(scores.dtype).min
    scores = torch.nan_to_num(scores, nan=least, neginf=least, posinf=-least)
    if protected is not None:
        scores = scores.masked_fill(protected, float("inf"))
    order = scores.masked_fill(~mask, -float("inf")).argsort(dim=1, descending=True, stable=True)
    return inverse(order)


def top_mask(scores: Tensor, mask: Tensor, counts: Tensor, protected: Tensor | None = None) -> Tensor:
    """Choose the highest scores of each sample, in the order of :func:`ranks`.

    Args:
        scores: [B,N] float.
        mask: [B,N] bool, valid tokens.
        counts: [B] long, how many to choose, at most the valid ones.
        protected: [B,N] bool.

    Returns:
        [B,N] bool.
    """
    return (ranks(scores, mask, protected) < counts[:, None]) & mask


def chosen_indices(chosen: Tensor, slots: int) -> Tensor:
    """Indices of the chosen tokens in ascending order.

    Args:
        chosen: [B,N] bool, at most ``slots`` a row.
        slots: K.

    Returns:
        [B,K] long, 0 past the last one.
    """
    index = torch.arange(chosen.shape[1], device=chosen.device).expand(chosen.shape)
    slot = torch.where(chosen, chosen.long().cumsum(1) - 1, slots)
    return index.new_zeros(chosen.shape[0], slots + 1).scatter_(1, slot, index)[:, :slots]
