"""Pruning by one score per token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.salience import low_entropy, mean_received
from qm_lightning.merging.select import top_mask
from qm_lightning.tokens import MergedTokens, Tokens


class TopKPrune(BudgetMerger):
    """Keeps the K tokens of highest score.

    Args:
        budget: tokens kept per sample; ``None``: ``FixedBudget()``.
        by: ``salience`` (low attention entropy, what QuickMerge goes by), ``norm`` (of the values) or
            ``received`` (attention received, which the backbone gives on request).
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(
        self, budget: Budget | None = None, by: Literal["salience", "norm", "received"] = "salience"
    ) -> None:
        super().__init__(budget)
        self.by = by

    @property
    def reads_attention(self) -> bool:
        """With ``by="salience"`` or ``by="received"``, or for the budget."""
        return self.by == "salience" or super().reads_attention

    @property
    def reads_received(self) -> bool:
        """With ``by="received"``."""
        return self.by == "received"

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The K highest scores, in order."""
        scores = self._scores(tokens)
        counts = self.counts(tokens, scores if self.by == "salience" else None)
        chosen = top_mask(scores, tokens.mask, counts, tokens.protected)
        return prune(tokens, chosen, self.slots(tokens, counts))

    def _scores(self, tokens: Tokens) -> Tensor:
        if self.by == "salience":
            return low_entropy(tokens)
        if self.by == "received":
            return mean_received(tokens)
        dtype = torch.promote_types(tokens.values.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(tokens.values.to(dtype), dim=-1)
        return norm
