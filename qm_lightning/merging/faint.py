"""Tokens that are no anchors stay next to unseen in training: salience learns what each would be worth (ours)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.assemble import own_sizes
from qm_lightning.tokens import MergedTokens, Tokens


def with_faint_tokens(tokens: Tokens, merged: MergedTokens, gate: Tensor, faint: float) -> MergedTokens:
    """Put the tokens that are no anchors back between the merged ones, each by itself and next to unseen.

    The size of a token weighs it in the prior's attention, so a gate on it gets the gradient of being seen: of a
    member, whether it would do better as an anchor. A gate on its share of the group's average alone cannot know.

    Args:
        tokens: the merger's input.
        merged: its output, with anchors.
        gate: [B,N] float, 1 for anchors and 0 for others, with a gradient.
        faint: share of its size that a token keeps which is no anchor.

    Returns:
        N tokens in the order of the input, an anchor with its group's average, ``faint`` where there is none.
    """
    if merged.anchors is None:
        raise ValueError("with_faint_tokens needs MergedTokens.anchors")
    N = tokens.mask.shape[1]
    index = torch.arange(N, device=gate.device).expand_as(tokens.mask)
    place = torch.where(merged.mask, merged.anchors, N)  # the slots of no group go past the end
    rows = place.unsqueeze(-1).expand_as(merged.values)
    own = tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)
    size = F.pad(own_sizes(tokens), (0, 1)).scatter(1, place, merged.size)[:, :N]
    anchor = F.pad(torch.zeros_like(tokens.mask), (0, 1)).scatter(1, place, True)[:, :N]
    group = merged.anchors.gather(1, merged.assignment.clamp(min=0))
    return replace(
        merged,
        values=F.pad(own, (0, 0, 0, 1)).scatter(1, rows, merged.values)[:, :N],
        mask=tokens.mask,
        size=size * (faint + (1.0 - faint) * gate),
        positions=tokens.positions.masked_fill(~tokens.mask.unsqueeze(-1), 0),
        ready=F.pad(index * tokens.mask, (0, 1)).scatter(1, place, merged.ready)[:, :N],
        assignment=torch.where(merged.assignment >= 0, group, -1),
        anchors=index * tokens.mask,
        faint=tokens.mask & ~anchor,
    )
