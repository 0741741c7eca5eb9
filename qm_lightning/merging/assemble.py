"""From groups to merged tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.select import chosen_indices
from qm_lightning.tokens import MergedTokens, Tokens


def assemble(
    tokens: Tokens,
    assignment: Tensor,
    weights: Tensor,
    anchors: Tensor,
    counts: Tensor,
    *,
    whole: bool,
    losses: dict[str, Tensor] | None = None,
) -> MergedTokens:
    """Average each group and say where it came from.

    Args:
        tokens: the input.
        assignment: [B,N] long, group of each token in [0,K), -1 = dropped or padding.
        weights: [B,N] float > 0 for grouped tokens; an average divides by the group's sum.
        anchors: [B,K] long, the token that names each group, ascending.
        counts: [B] long, groups per sample.
        whole: the method reads the whole sequence before it decides, so every group is ready at its end;
            otherwise a group is ready with its last member.
        losses: the merger's own.

    Returns:
        K groups per sample, in the order of ``anchors``.
    """
    B, N = assignment.shape
    K = anchors.shape[1]
    mask = torch.arange(K, device=counts.device) < counts[:, None]
    member = assignment >= 0
    slot = torch.where(member, assignment, K)  # dropped tokens go to a slot that is cut off
    weights = weights.masked_fill(~member, 0.0)
    mass = weights.new_zeros(B, K + 1).scatter_add(1, slot, weights)
    tiny = torch.finfo(weights.dtype).tiny
    share = torch.where(member, weights / mass.gather(1, slot).clamp(min=tiny), 0.0)
    sizes = weights.new_ones(B, N) if tokens.size is None else tokens.size.detach().to(weights.dtype)
    index = torch.arange(N, device=slot.device).expand(B, N)
    if whole:
        last = torch.where(tokens.mask, index, -1).amax(1, keepdim=True).expand(B, K)
    else:
        last = slot.new_full((B, K + 1), -1).scatter_reduce(1, slot, index, "amax")[:, :K]
    positions = tokens.positions.gather(1, anchors.unsqueeze(-1).expand(-1, -1, tokens.positions.shape[-1]))
    return MergedTokens(
        values=_group_sums(tokens.values, slot, share, K),
        mask=mask,
        size=weights.new_zeros(B, K + 1).scatter_add(1, slot, sizes)[:, :K],
        positions=positions.masked_fill(~mask.unsqueeze(-1), 0),
        ready=last.masked_fill(~mask, 0),
        assignment=assignment,
        weights=weights,
        losses=losses or {},
        counts=tokens.counts,
        anchors=anchors.masked_fill(~mask, 0),
        end=tokens.positions.amax(-1).masked_fill(~tokens.mask, -1).amax(1) + 1,
    )


def _group_sums(values: Tensor, slot: Tensor, share: Tensor, K: int) -> Tensor:
    """``sum over the members of share * values``, [B,K,D], added in the order of the tokens.

    Sorting by group and summing bags reads each value once; it is faster than a scatter-add, and on an
    accelerator its sums have a fixed order, which atomic additions do not.
    """
    B = slot.shape[0]
    dtype = torch.promote_types(values.dtype, share.dtype)
    flat = (slot + torch.arange(B, device=slot.device)[:, None] * (K + 1)).flatten()
    order = flat.argsort(stable=True)
    starts = torch.searchsorted(flat[order], torch.arange(B * (K + 1), device=slot.device))
    sums = F.embedding_bag(
        order,
        values.to(dtype).flatten(0, 1),
        starts,
        mode="sum",
        per_sample_weights=share.to(dtype).flatten()[order],
    )
    return sums.view(B, K + 1, -1)[:, :K].to(values.dtype)


def merge_into(tokens: Tokens, parent: Tensor, weights: Tensor, slots: int, *, whole: bool) -> MergedTokens:
    """Average the tokens that share a parent; the parent names the group.

    Args:
        tokens: the input.
        parent: [B,N] long, the token that each one joins, itself if it stays; -1 = dropped or padding.
        weights: [B,N] float > 0 for grouped tokens.
        slots: K.
        whole: see :func:`assemble`.

    Returns:
        One merged token per parent, in order.
    """
    chosen = parent == torch.arange(parent.shape[1], device=parent.device)
    number = chosen.long().cumsum(1) - 1
    assignment = torch.where(parent >= 0, number.gather(1, parent.clamp(min=0)), -1)
    return assemble(tokens, assignment, weights, chosen_indices(chosen, slots), chosen.sum(1), whole=whole)


def prune(tokens: Tokens, chosen: Tensor, slots: int, *, whole: bool = True) -> MergedTokens:
    """Keep the chosen tokens as they are and drop the rest.

    Args:
        tokens: the input.
        chosen: [B,N] bool.
        slots: K.
        whole: see :func:`assemble`.

    Returns:
        The chosen tokens in order; dropped ones have assignment -1.
    """
    index = torch.arange(chosen.shape[1], device=chosen.device)
    return merge_into(tokens, torch.where(chosen, index, -1), own_sizes(tokens), slots, whole=whole)


def own_sizes(tokens: Tokens) -> Tensor:
    """How many raw tokens each one stands for, [B,N] float32 or better, 0 for padding."""
    dtype = torch.promote_types(tokens.values.dtype, torch.float32)
    return tokens.mask.to(dtype) if tokens.size is None else tokens.size.to(dtype) * tokens.mask
