"""EViT: keep the attentive tokens, fuse the inattentive ones into one (spec reduction.md, section 7)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qm_lightning.merging.assemble import merge_into
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.salience import mean_received
from qm_lightning.merging.select import top_mask
from qm_lightning.tokens import MergedTokens, Tokens


class EViT(BudgetMerger):
    """Keeps the K - 1 tokens that receive most attention; all others become one token.

    The score is the attention received, mean over queries, heads and layers, where EViT takes the class
    token's attention; an ``HFBackbone`` records it for this merger. The fused token is the
    published sum ``sum_i a_i x_i``, which is not divided by the mass and so has a small norm; it stands at
    its last member.

    Args:
        budget: tokens left per sample, the fused one included; ``None``: ``FixedBudget()``.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__(budget)

    @property
    def reads_received(self) -> bool:
        """Always."""
        return True

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Kept tokens and the fused one, in order; ready at the end."""
        return self.merge(tokens, mean_received(tokens))

    def merge(self, tokens: Tokens, score: Tensor) -> MergedTokens:
        """Merge by a given score.

        Args:
            tokens: the input.
            score: [B,N] float >= 0, the attention that each token receives.

        Returns:
            The merged tokens.
        """
        counts = self.counts(tokens)
        all_stay = counts == tokens.counts
        kept = top_mask(score, tokens.mask, torch.where(all_stay, counts, counts - 1), tokens.protected)
        fused = tokens.mask & ~kept
        index = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        last = torch.where(fused, index, -1).amax(1, keepdim=True)
        parent = torch.where(fused, last, index).masked_fill(~tokens.mask, -1)
        # Equal weights where a token stands alone or nothing was attended to: an average needs some mass.
        dtype = torch.promote_types(tokens.values.dtype, torch.float32)
        score = score.to(dtype)
        weights = torch.where(fused, score.clamp(min=torch.finfo(dtype).eps), 1.0)
        merged = merge_into(tokens, parent, weights, self.slots(tokens, counts), whole=True)
        # A scatter adds in the order of the tokens, so that padding changes no bit; a row's sum does not.
        mass = score.new_zeros(kept.shape[0], 1).scatter_add(
            1, torch.zeros_like(index), torch.where(fused, score, 0.0)
        )
        slot = merged.assignment.gather(1, last.clamp(min=0))
        place = torch.arange(merged.mask.shape[1], device=slot.device)
        scale = torch.where((place == slot) & (last >= 0), mass, 1.0)
        return replace(merged, values=merged.values * scale.unsqueeze(-1).to(merged.values.dtype))
