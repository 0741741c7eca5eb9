"""Bipartite soft matching, repeated until the budget is met (spec reduction.md, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.assemble import own_sizes
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.select import chosen_indices, ranks, width
from qm_lightning.tokens import Tokens

Carry = Literal["mean", "keep"]


@dataclass
class Lanes:
    """The free tokens that are left, in order, an empty lane before them where they start at an odd place.

    Attributes:
        metric: [B,n,M], not scaled.
        size: [B,n].
        token: [B,n] long, their index in N.
        alive: [B,n] bool.
        offset: [B] long, 0 or 1, empty lanes at the start.
    """

    metric: Tensor
    size: Tensor
    token: Tensor
    alive: Tensor
    offset: Tensor


Pairing = Callable[[Lanes, Tensor], Tensor]


@torch.no_grad()
def match(
    tokens: Tokens,
    counts: Tensor,
    budget: Budget,
    *,
    pairing: Pairing | None = None,
    carry: Carry = "mean",
    rounds: int = 1,
) -> Tensor:
    """Match pairs until ``counts`` tokens are left.

    One matching removes at most half of the tokens; sizes and metric are carried to the next one. Protected
    tokens take no part, and places are counted without them (but for those at the start, a class token say,
    so that the parity of what follows is ToMe's).

    Args:
        tokens: the input.
        counts: [B] long, tokens left, protected ones included.
        budget: what ``counts`` came from; it bounds the rounds where counts cannot be read.
        pairing: (lanes, how many to remove [B]) -> the lane that each one joins [B,n], its own if it stays;
            ``None``: :func:`even_with_odd`.
        carry: metric of a merged token: the size-weighted mean of its members, or that of the one that stays.
        rounds: least number of matchings over which removals are spread evenly.

    Returns:
        [B,N] long, index of the token that each one joins, its own if it stays; -1 = padding.
    """
    pairing = even_with_odd if pairing is None else pairing
    N = tokens.mask.shape[1]
    parent = torch.arange(N, device=counts.device).expand(tokens.mask.shape).masked_fill(~tokens.mask, -1)
    lanes, remaining = _start(tokens), tokens.counts - counts
    each = (remaining + rounds - 1) // rounds
    on_cpu = counts.device.type == "cpu"
    limit = N if on_cpu else rounds + math.ceil(math.log2(max(1.0, budget.steepest(N))))
    for _ in range(limit):
        if on_cpu and not bool((remaining > 0).any()):
            break
        remove = remaining.minimum(each).minimum(lanes.alive.sum(1) // 2)
        lanes, joins = _merge_lanes(lanes, pairing(lanes, remove), carry, N)
        parent = torch.where(parent >= 0, joins.gather(1, parent.clamp(min=0)), -1)
        remaining = remaining - remove
    return parent


def _start(tokens: Tokens) -> Lanes:
    metric = tokens.values if tokens.metric is None else tokens.metric
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    free = tokens.mask
    offset = torch.zeros_like(tokens.counts)
    if tokens.protected is not None:
        free = tokens.mask & ~tokens.protected
        offset = (~free & tokens.mask).long().cumprod(1).sum(1) % 2
    sizes = own_sizes(tokens).to(metric.dtype)
    index = torch.arange(free.shape[1], device=free.device).expand(free.shape)
    return _gather_lanes(metric, sizes, index, free, offset)


def _gather_lanes(metric: Tensor, size: Tensor, token: Tensor, keep: Tensor, offset: Tensor) -> Lanes:
    """The kept lanes, in order, ``offset`` [B] (0 or 1) lanes further on."""
    left = keep.sum(1)
    n = width(left + offset, keep.shape[1] + 1)
    place = torch.arange(n, device=keep.device) - offset[:, None]
    alive = (place >= 0) & (place < left[:, None])
    source = chosen_indices(keep, n).gather(1, place.clamp(min=0))
    # An empty lane may copy padding that holds NaN.
    picked = metric.gather(1, source.unsqueeze(-1).expand(-1, -1, metric.shape[-1]))
    picked = picked.masked_fill(~alive.unsqueeze(-1), 0.0)
    return Lanes(picked, size.gather(1, source) * alive, token.gather(1, source), alive, offset)


def even_with_odd(lanes: Lanes, remove: Tensor) -> Tensor:
    """The ``remove`` [B] even lanes that are most like an odd one join it (ToMe)."""
    unit = F.normalize(lanes.metric, dim=-1, eps=1e-6)
    with torch.autocast(unit.device.type, enabled=False):  # in bfloat16 similar pairs tie
        similarity = torch.bmm(unit[:, 0::2], unit[:, 1::2].transpose(1, 2))
    best, partner = similarity.masked_fill_(~lanes.alive[:, None, 1::2], -float("inf")).max(-1)
    source = lanes.alive[:, 0::2]
    gone = (ranks(best, source) < remove[:, None]) & source
    target = torch.arange(lanes.alive.shape[1], device=remove.device).expand(lanes.alive.shape).clone()
    target[:, 0::2] = torch.where(gone, 2 * partner + 1, target[:, 0::2])
    return target


def _merge_lanes(lanes: Lanes, target: Tensor, carry: Carry, tokens: int) -> tuple[Lanes, Tensor]:
    """Let lanes join others.

    Returns:
        What is left, and [B,tokens] long: the token that each token joins.
    """
    # Empty lanes name a token that is elsewhere, so they write to a slot that is cut off.
    own = torch.where(lanes.alive, lanes.token, tokens)
    joins = torch.arange(tokens + 1, device=target.device).repeat(target.shape[0], 1)
    joins = joins.scatter(1, own, lanes.token.gather(1, target))[:, :tokens]
    metric, size = lanes.metric, lanes.size
    if carry == "mean":
        size = torch.zeros_like(size).scatter_add(1, target, lanes.size)
        share = lanes.size / size.gather(1, target).clamp(min=torch.finfo(size.dtype).tiny)
        weighted = metric * share.unsqueeze(-1)
        metric = torch.zeros_like(metric).scatter_add(1, target.unsqueeze(-1).expand_as(weighted), weighted)
    left = lanes.alive & (target == torch.arange(target.shape[1], device=target.device))
    return _gather_lanes(metric, size, lanes.token, left, lanes.offset), joins
