"""Which anchor each token joins: the most similar one, minus a price for distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.select import chosen_indices, width
from qm_lightning.tokens import Tokens


def unit_metric(tokens: Tokens) -> Tensor:
    """What similarity compares, scaled to length 1.

    Returns:
        [B,N,M] float32 or better; zero for padding and for zero vectors, so that no NaN decides anything.
    """
    metric = tokens.values if tokens.metric is None else tokens.metric
    metric = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))
    return F.normalize(metric.masked_fill(~tokens.mask.unsqueeze(-1), 0.0), dim=-1, eps=1e-6)


@torch.no_grad()
def nearest_anchor(
    tokens: Tokens, chosen: Tensor, anchors: Tensor, counts: Tensor, locality: float
) -> Tensor:
    """Join each token to ``argmax_k cos(x_i, x_a_k) - locality * distance(pos_i, pos_a_k)``.

    Protected anchors take no members. Distance 1 is the diagonal of the box around the sample's tokens.

    Args:
        tokens: the input.
        chosen: [B,N] bool, the anchors.
        anchors: [B,K] long, their indices, ascending.
        counts: [B] long, how many of them are real.
        locality: price of distance 1.

    Returns:
        [B,N] long, group in [0,K), -1 for padding.
    """
    unit = unit_metric(tokens)
    # Anchors are settled, so only the others are compared: as much work as ToMe's halves.
    others = tokens.mask & ~chosen
    left = others.sum(1)
    rest = chosen_indices(others, width(left, others.shape[1]))
    price = _price(tokens, rest, anchors, counts, locality).to(unit.dtype)
    with torch.autocast(unit.device.type, enabled=False):  # in bfloat16 similarities tie
        affinity = torch.baddbmm(price, _take(unit, rest), _take(unit, anchors).transpose(1, 2))
    used = torch.arange(rest.shape[1], device=rest.device) < left[:, None]
    number = chosen.long().cumsum(1) - 1
    group = F.pad(number, (0, 1)).scatter(1, torch.where(used, rest, others.shape[1]), affinity.argmax(-1))
    return group[:, :-1].masked_fill(~tokens.mask, -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B,N,M] at ``index`` [B,R] -> [B,R,M]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _price(tokens: Tokens, rest: Tensor, anchors: Tensor, counts: Tensor, locality: float) -> Tensor:
    """Minus the price of joining each anchor, [B,R,K] (R = 1 without locality); -inf for a closed anchor."""
    closed = torch.arange(anchors.shape[1], device=counts.device) >= counts[:, None]
    if tokens.protected is not None:
        closed = closed | tokens.protected.gather(1, anchors)
    barred = torch.zeros(closed.shape, device=closed.device).masked_fill(closed, -float("inf")).unsqueeze(1)
    if locality == 0:
        return barred
    where = tokens.positions.float()
    real = tokens.mask.unsqueeze(-1)
    high = where.masked_fill(~real, -float("inf")).amax(1, keepdim=True)
    low = where.masked_fill(~real, float("inf")).amin(1, keepdim=True)
    diagonal = (high - low).square().sum(-1, keepdim=True).sqrt().clamp(min=1.0)
    where = (where - low) * (locality / diagonal)
    return torch.cdist(_take(where, rest), _take(where, anchors)).neg_().add_(barred)
