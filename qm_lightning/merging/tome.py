"""ToMe: bipartite soft matching, repeated until the budget is met (spec reduction.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.base import Causality, Merger, assemble, width
from qm_lightning.merging.budget import Budget, FixedBudget
from qm_lightning.tokens import MergedTokens, Tokens


@dataclass
class _State:
    """Groups so far, in order, valid ones first: [B,n,...]; ``group`` [B,N] says where each input token is."""

    metric: Tensor
    size: Tensor
    alive: Tensor
    protected: Tensor
    anchor: Tensor
    group: Tensor


class ToMe(Merger):
    """Merges the most similar pairs between even and odd tokens.

    One matching can merge at most half of the tokens; a larger compression takes several, with sizes carried on.

    Args:
        budget: tokens kept per sample; default ``FixedBudget(2.37)``.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__()
        self.budget = budget or FixedBudget()

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Size-weighted averages of similar tokens, ordered by the destination's place."""
        counts = self.budget(tokens.mask.float(), tokens.mask)
        group, anchors, alive = match(tokens, counts)
        counts = alive.sum(1)
        slots = width(counts, anchors.shape[1])
        dtype = torch.promote_types(tokens.values.dtype, torch.float32)
        weights = tokens.mask.to(dtype) if tokens.size is None else tokens.size.to(dtype)
        return assemble(tokens, group, weights, anchors[:, :slots], counts, whole=True)


@torch.no_grad()
def match(tokens: Tokens, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Match until ``counts`` groups are left (or no pair may merge any more).

    Returns:
        group [B,N] long (-1 = padding), anchors [B,n] long, alive [B,n] bool (valid ones first).
    """
    state = _start(tokens)
    # Each round at least halves what may merge; more rounds than this would do nothing.
    for _ in range(max(1, tokens.mask.shape[1].bit_length())):
        before = state.alive.sum(1)
        if counts.device.type == "cpu" and bool((before <= counts).all()):
            break
        state = _round(state, (before - counts).clamp(min=0))
        if counts.device.type == "cpu" and bool((state.alive.sum(1) == before).all()):
            break
    return state.group, state.anchor, state.alive


def _start(tokens: Tokens) -> _State:
    B, N = tokens.mask.shape
    metric = tokens.values if tokens.metric is None else tokens.metric
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32)).masked_fill(
        ~tokens.mask.unsqueeze(-1), 0.0
    )
    size = metric.new_ones(B, N) if tokens.size is None else tokens.size.to(metric.dtype)
    protected = torch.zeros_like(tokens.mask) if tokens.protected is None else tokens.protected
    index = torch.arange(N, device=metric.device).expand(B, N)
    state = _State(metric, size, tokens.mask, protected, index, index.masked_fill(~tokens.mask, -1))
    return _ordered(state, tokens.mask, index)


def _ordered(state: _State, alive: Tensor, anchor: Tensor) -> _State:
    """Put the groups that are alive first, in the order of their anchors."""
    order = torch.where(alive, anchor, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    group = torch.where(state.group >= 0, rank.gather(1, state.group.clamp(min=0)), -1)
    n = int(alive.sum(1).max()) if alive.device.type == "cpu" else alive.shape[1]
    order = order[:, :n]
    return _State(
        state.metric.gather(1, order.unsqueeze(-1).expand(-1, -1, state.metric.shape[-1])),
        state.size.gather(1, order),
        alive.gather(1, order),
        state.protected.gather(1, order) & alive.gather(1, order),
        anchor.gather(1, order),
        group,
    )


def _round(state: _State, remove: Tensor) -> _State:
    """One matching: the ``remove`` best pairs (at most half of the tokens) merge into their odd member."""
    n = state.alive.shape[1]
    if n < 2:
        return state
    unit = F.normalize(state.metric, dim=-1, eps=1e-6)
    # In bfloat16 similar pairs tie.
    with torch.autocast(unit.device.type, enabled=False):
        similarity = torch.bmm(unit[:, 0::2], unit[:, 1::2].transpose(1, 2))
    open_ = state.alive & ~state.protected
    similarity = similarity.masked_fill(~open_[:, 1::2].unsqueeze(1), -float("inf"))
    best, partner = similarity.max(-1)
    best = best.masked_fill(~open_[:, 0::2], -float("inf"))
    limit = (
        ((state.alive.sum(1) - state.protected.sum(1)) // 2).minimum(best.isfinite().sum(1)).minimum(remove)
    )
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    gone = torch.zeros_like(state.alive)
    gone[:, 0::2] = rank < limit[:, None]
    target = torch.arange(n, device=gone.device).expand_as(gone).clone()
    target[:, 0::2] = torch.where(gone[:, 0::2], 2 * partner + 1, target[:, 0::2])
    size = torch.zeros_like(state.size).scatter_add(1, target, state.size)
    share = state.size / size.gather(1, target).clamp(min=torch.finfo(size.dtype).tiny)
    weighted = state.metric * share.unsqueeze(-1)
    metric = torch.zeros_like(state.metric).scatter_add(1, target.unsqueeze(-1).expand_as(weighted), weighted)
    group = torch.where(state.group >= 0, target.gather(1, state.group.clamp(min=0)), -1)
    merged = _State(metric, size, state.alive, state.protected, state.anchor, group)
    return _ordered(merged, state.alive & ~gone, state.anchor)
