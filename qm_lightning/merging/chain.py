"""One merging after another, as one: where each of the first input's tokens is in the end."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.tokens import MergedTokens


def chain(first: MergedTokens, second: MergedTokens) -> MergedTokens:
    """Put two mergings together.

    Args:
        first: N tokens to J.
        second: those J to K. Its sizes must have been made from the sizes of ``first``.

    Returns:
        N tokens to K: values, mask, sizes and positions of ``second``; a token that either one dropped is
        dropped, and a merged token is ready when all that it was made of is. A member's weight is its share
        in the first group times the weight of that group in the second one.
    """
    dropped = first.assignment < 0
    middle = first.assignment.clamp(min=0)
    assignment = second.assignment.gather(1, middle).masked_fill(dropped, -1)
    share = first.weights / _group_sums(first).gather(1, middle)
    weights = (share * second.weights.gather(1, middle)).masked_fill(assignment < 0, 0.0)
    anchors = None
    if first.anchors is not None and second.anchors is not None:
        anchors = first.anchors.gather(1, second.anchors).masked_fill(~second.mask, 0)
    return MergedTokens(
        values=second.values,
        mask=second.mask,
        size=second.size,
        positions=second.positions,
        ready=_ready(first, second),
        assignment=assignment,
        weights=weights,
        losses={**first.losses, **second.losses},
        counts=first.counts,
        anchors=anchors,
        end=first.end,
    )


def _group_sums(merged: MergedTokens) -> Tensor:
    """Sum of the members' weights, [B,J]; 1 where there is none."""
    slot = merged.assignment.clamp(min=0)
    sums = merged.weights.new_zeros(merged.mask.shape).scatter_add(1, slot, merged.weights)
    return torch.where(sums > 0, sums, 1.0)


def _ready(first: MergedTokens, second: MergedTokens) -> Tensor:
    """The latest of what ``second`` waits for, in the first one's time.

    The second merging decides when it has seen the first one's output number ``ready``, and that number may
    itself have waited.
    """
    waits = first.ready.cummax(1).values
    last = first.mask.sum(1, keepdim=True).clamp(min=1) - 1
    return waits.gather(1, second.ready.minimum(last)).masked_fill(~second.mask, 0)
