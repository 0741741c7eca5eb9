"""Tokens that are no anchors stay next to unseen in training: salience learns what each would be worth (ours)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qm_lightning.merging.assemble import own_sizes
from qm_lightning.tokens import MergedTokens, Tokens


def with_faint_tokens(
    tokens: Tokens, merged: MergedTokens, chosen: Tensor, gate: Tensor, faint: float
) -> MergedTokens:
    """Put the tokens that are no anchors back between the merged ones, each by itself and next to unseen.

    The size of a token weighs it in the prior's attention, so a gate on it gets the gradient of being seen: of a
    member, whether it would do better as an anchor. A gate on its share of the group's average alone cannot know.

    Args:
        tokens: the merger's input.
        merged: its output.
        chosen: [B,N] bool, the anchors; each is a member of its own group.
        gate: [B,N] float, 1 for anchors and 0 for others, with a gradient.
        faint: share of its size that a token keeps which is no anchor.

    Returns:
        N tokens in the order of the input, an anchor with its group's average, ``faint`` where there is none.
    """
    index = torch.arange(tokens.mask.shape[1], device=gate.device) * tokens.mask
    real = tokens.mask.unsqueeze(-1)
    group = merged.assignment.clamp(min=0)
    if merged.anchors is None:
        raise ValueError("with_faint_tokens needs MergedTokens.anchors")
    own = torch.where(chosen, merged.size.gather(1, group), own_sizes(tokens))
    return replace(
        merged,
        values=torch.where(chosen.unsqueeze(-1), merged.unmerge(), tokens.values.masked_fill(~real, 0.0)),
        mask=tokens.mask,
        size=own * (faint + (1.0 - faint) * gate),
        positions=tokens.positions.masked_fill(~real, 0),
        ready=torch.where(chosen, merged.ready.gather(1, group), index),
        assignment=torch.where(merged.assignment >= 0, merged.anchors.gather(1, group), -1),
        anchors=index,
        faint=tokens.mask & ~chosen,
    )
