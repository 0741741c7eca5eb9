"""Random pruning: what a method must beat to have a point."""

from __future__ import annotations

from typing import ClassVar

from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.noise import Noise
from qm_lightning.merging.select import top_mask
from qm_lightning.tokens import MergedTokens, Tokens


class RandomPrune(BudgetMerger):
    """Keeps K tokens drawn at random, anew for every sample and epoch, in evaluation too.

    Args:
        budget: tokens kept per sample; ``None``: ``FixedBudget()``.
        seed: of the draw.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(self, budget: Budget | None = None, seed: int = 0) -> None:
        super().__init__(budget)
        self.noise = Noise(seed)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """K random tokens, in order."""
        counts = self.counts(tokens)
        chosen = top_mask(self.noise.uniform(tokens), tokens.mask, counts, tokens.protected)
        return prune(tokens, chosen, self.slots(tokens, counts))
