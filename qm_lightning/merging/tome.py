"""ToMe: token merging by bipartite soft matching (spec reduction.md, section 2)."""

from __future__ import annotations

from typing import ClassVar

from qm_lightning.merging.assemble import merge_into, own_sizes
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.bipartite import match
from qm_lightning.merging.budget import Budget
from qm_lightning.tokens import MergedTokens, Tokens


class ToMe(BudgetMerger):
    """Merges the most similar pairs of even and odd tokens into size-weighted averages.

    Args:
        budget: tokens left per sample; ``None``: ``FixedBudget()``.
        rounds: least number of matchings over which the removals are spread. One matching removes at most
            half of the tokens, so a larger compression takes more; in its backbone ToMe has one per layer.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(self, budget: Budget | None = None, rounds: int = 1) -> None:
        super().__init__(budget)
        self.rounds = rounds

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Averages in the order of the token that each pair was merged into; ready at the end."""
        counts = self.counts(tokens)
        parent = match(tokens, counts, self.budget, rounds=self.rounds)
        return merge_into(tokens, parent, own_sizes(tokens), self.slots(tokens, counts), whole=True)
