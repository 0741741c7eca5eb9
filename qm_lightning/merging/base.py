"""What every merger is, and how groups become merged tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.tokens import MergedTokens, Tokens

Causality = Literal["streaming", "ordered", "global"]


class Merger(nn.Module, ABC):
    """Tokens -> MergedTokens.

    Attributes:
        causality: ``streaming``: a merged token depends on the past only; ``ordered``: order is kept, but the
            decision looks at the whole sequence; ``global``: groups span distant positions.
    """

    causality: ClassVar[Causality] = "global"

    def build(self, input_dim: int, layers: int) -> None:
        """Make parameters for tokens of width ``input_dim`` and ``layers`` attention layers; none by default."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch."""

    def __call__(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; a sample without a valid token is an error."""
        require_tokens(tokens.mask)
        merged: MergedTokens = super().__call__(tokens)
        return merged


def require_tokens(mask: Tensor) -> None:
    """Refuse a sample without a valid token.

    Args:
        mask: [B,N] bool.

    Raises:
        UserError: names the samples. On an accelerator the check runs there and does not stall it.
    """
    filled = mask.any(dim=1)
    if mask.device.type != "cpu":
        torch._assert_async(filled.all(), "a sample of the batch has no valid token")
    elif not bool(filled.all()):
        rows = (~filled).nonzero().flatten().tolist()
        raise UserError(
            f"samples {rows} of the batch have no valid token; expected at least one each; "
            "leave empty samples out of the shards"
        )


def width(counts: Tensor, bound: int) -> int:
    """Merged tokens K of the batch: the largest count on the CPU; elsewhere the bound, since reading stalls."""
    return int(counts.max()) if counts.device.type == "cpu" else bound


def top_mask(scores: Tensor, mask: Tensor, counts: Tensor, protected: Tensor | None = None) -> Tensor:
    """Choose the highest scores of each sample; protected tokens first, the lowest index wins ties.

    Args:
        scores: [B,N] float.
        mask: [B,N] bool, valid tokens.
        counts: [B] long, how many to choose, at most the valid ones.
        protected: [B,N] bool.

    Returns:
        [B,N] bool.
    """
    scores = torch.nan_to_num(scores.detach(), nan=torch.finfo(scores.dtype).min)
    if protected is not None:
        scores = scores.masked_fill(protected, float("inf"))
    order = scores.masked_fill(~mask, -float("inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & mask


def chosen_indices(chosen: Tensor, slots: int) -> Tensor:
    """Indices of the chosen tokens in ascending order, [B,slots] long; past the last one, others follow."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]


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
        anchors: [B,K] long, the token that names each group.
        counts: [B] long, groups per sample.
        whole: the method reads the whole sequence before it decides, so every group is ready at its end;
            otherwise a group is ready with its last member.
        losses: the merger's own.

    Returns:
        K groups per sample, in the order of ``anchors``.
    """
    B, N, D = tokens.values.shape
    K = anchors.shape[1]
    mask = torch.arange(K, device=counts.device) < counts[:, None]
    member = assignment >= 0
    slot = torch.where(member, assignment, K)  # dropped tokens go to a slot that is cut off
    weights = weights * member.to(weights.dtype)
    mass = weights.new_zeros(B, K + 1).scatter_add(1, slot, weights)
    share = torch.where(
        member, weights / mass.gather(1, slot).clamp(min=torch.finfo(weights.dtype).tiny), 0.0
    )
    flat = slot + torch.arange(B, device=slot.device)[:, None] * (K + 1)
    weighted = tokens.values * share.unsqueeze(-1).to(tokens.values.dtype)
    # Padding may hold NaN, and zero times NaN is NaN.
    weighted = weighted.masked_fill(~member.unsqueeze(-1), 0.0)
    values = tokens.values.new_zeros(B * (K + 1), D).index_add(0, flat.flatten(), weighted.flatten(0, 1))
    values = values.view(B, K + 1, D)[:, :K]
    raw_size = weights.new_ones(B, N) if tokens.size is None else tokens.size.to(weights.dtype)
    size = weights.new_zeros(B, K + 1).scatter_add(1, slot, raw_size.detach())[:, :K] * mask
    index = torch.arange(N, device=slot.device).expand(B, N)
    if whole:
        last = torch.where(tokens.mask, index, -1).amax(1, keepdim=True).expand(B, K)
    else:
        last = slot.new_full((B, K + 1), -1).scatter_reduce(1, slot, index, "amax")[:, :K]
    positions = tokens.positions.gather(1, anchors.unsqueeze(-1).expand(-1, -1, tokens.positions.shape[-1]))
    return MergedTokens(
        values=values,
        mask=mask,
        size=size,
        positions=positions.masked_fill(~mask.unsqueeze(-1), 0),
        ready=last.masked_fill(~mask, 0),
        assignment=assignment,
        weights=weights,
        losses=losses or {},
        counts=tokens.counts,
        anchors=anchors.masked_fill(~mask, 0),
    )


def prune(
    tokens: Tokens, chosen: Tensor, slots: int, losses: dict[str, Tensor] | None = None
) -> MergedTokens:
    """Keep the chosen tokens as they are and drop the rest.

    Args:
        tokens: the input.
        chosen: [B,N] bool.
        slots: K.
        losses: the merger's own.

    Returns:
        The chosen tokens in order; dropped ones have assignment -1.
    """
    assignment = torch.where(chosen, chosen.long().cumsum(1) - 1, -1)
    dtype = torch.promote_types(tokens.values.dtype, torch.float32)
    return assemble(
        tokens,
        assignment,
        chosen.to(dtype),
        chosen_indices(chosen, slots),
        chosen.sum(1),
        whole=True,
        losses=losses,
    )
