"""Anchors everywhere: a share of the budget goes to the most salient token of each part of the input (ours).

Salience alone may spend a small budget on one object and leave the next one without an anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.merging.select import ranks
from qm_lightning.merging.uniform_pool import blocks
from qm_lightning.tokens import Tokens


@torch.no_grad()
def spread(tokens: Tokens, scores: Tensor, counts: Tensor, coverage: float) -> Tensor:
    """Cut each sample into even blocks and raise the best token of each above all others.

    Args:
        tokens: the input.
        scores: [B,N] float, higher = keep.
        counts: [B] long, tokens to keep, protected ones among them.
        coverage: share of the free ones that blocks get, in [0,1].

    Returns:
        [B,N] float, the scores with the blocks' best tokens first.
    """
    free = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
    parts = (coverage * (counts - (tokens.mask & ~free).sum(1))).round().long()
    block = blocks(tokens.positions, free, parts.clamp(min=1))
    place = ranks(scores, free)
    last = place.shape[1]
    first = torch.full_like(place, last).scatter_reduce(1, block, place.masked_fill(~free, last), "amin")
    winner = free & (place == first.gather(1, block)) & (parts > 0)[:, None]
    real = scores.detach().masked_fill(~tokens.mask, 0.0)
    lift = real.amax(1, keepdim=True) - real.amin(1, keepdim=True) + 1.0
    return scores.detach() + torch.where(winner, lift, 0.0)
