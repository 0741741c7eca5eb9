"""Pruning baselines: keep K tokens, drop the rest."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qm_lightning.merging.base import Causality, Merger, prune, top_mask, width
from qm_lightning.merging.budget import Budget, FixedBudget
from qm_lightning.merging.noise import uniform
from qm_lightning.merging.salience import Salience
from qm_lightning.tokens import MergedTokens, Tokens


def _keep(tokens: Tokens, scores: Tensor, budget: Budget, salience: Tensor) -> MergedTokens:
    counts = budget(salience, tokens.mask)
    if tokens.protected is not None:
        counts = counts.maximum((tokens.protected & tokens.mask).sum(1))
    bound = tokens.mask.shape[1] if tokens.protected is not None else budget.bound(tokens.mask.shape[1])
    return prune(tokens, top_mask(scores, tokens.mask, counts, tokens.protected), width(counts, bound))


class RandomPrune(Merger):
    """Keeps K tokens drawn at random, anew for every sample and epoch.

    Args:
        budget: tokens kept per sample; default ``FixedBudget(2.37)``.
        seed: of the draw.
    """

    causality: ClassVar[Causality] = "ordered"
    calls: Tensor

    def __init__(self, budget: Budget | None = None, seed: int = 0) -> None:
        super().__init__()
        self.budget = budget or FixedBudget()
        self.seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tokens) -> MergedTokens:
        """K random tokens, in order."""
        seeds = tokens.seeds
        if seeds is None:
            seeds = (self.calls * 1_000_003).expand(tokens.mask.shape[0])
            if self.training:
                self.calls += 1
        scores = uniform(seeds, tokens.mask.shape[1], self.seed)
        return _keep(tokens, scores, self.budget, scores)


class TopKPrune(Merger):
    """Keeps the K tokens of highest salience, or of largest norm.

    Args:
        budget: tokens kept per sample; default ``FixedBudget(2.37)``.
        by: ``salience`` (low attention entropy) or ``norm`` (of the values).
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(self, budget: Budget | None = None, by: Literal["salience", "norm"] = "salience") -> None:
        super().__init__()
        self.budget = budget or FixedBudget()
        self.by = by
        self.salience = Salience()

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The K highest scores, in order."""
        scores = self.salience(tokens) if self.by == "salience" else tokens.values.float().norm(dim=-1)
        return _keep(tokens, scores, self.budget, scores)
