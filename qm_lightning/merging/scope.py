"""SCOPE: salience times gain in coverage, greedily (spec reduction.md, section 5)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.grouping import unit_metric
from qm_lightning.merging.salience import low_entropy, mean_received
from qm_lightning.merging.select import chosen_indices, width
from qm_lightning.tokens import MergedTokens, Tokens

NO_GAIN = 2e-7  # per token: what float32 makes of the difference between a vector and its copy


class SCOPE(BudgetMerger):
    """Keeps the tokens that cover the others best, salient ones first.

    ``score_j = s_j^alpha * sum_i max(0, S_ij - c_i)``, S the cosine similarity, c_i the best similarity of
    token i to a chosen one so far. Protected tokens are kept beside, outside the coverage.

    Args:
        budget: tokens kept per sample; ``None``: ``FixedBudget()``.
        alpha: exponent of the salience.
        by: the salience: low attention entropy, attention received (the published one is that from the class
            token), or none, which leaves set coverage alone.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(
        self,
        budget: Budget | None = None,
        alpha: float = 1.0,
        by: Literal["salience", "received", "uniform"] = "salience",
    ) -> None:
        super().__init__(budget)
        if by not in ("salience", "received", "uniform"):
            raise UserError(f"SCOPE(by={by!r}): expected salience, received or uniform")
        self.alpha, self.by = alpha, by

    @property
    def reads_attention(self) -> bool:
        """With ``by="salience"`` or ``by="received"``, or for the budget."""
        return self.by == "salience" or super().reads_attention

    @property
    def reads_received(self) -> bool:
        """With ``by="received"``."""
        return self.by == "received"

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The chosen tokens, in order."""
        return self.merge(tokens, self._salience(tokens))

    def merge(self, tokens: Tokens, salience: Tensor) -> MergedTokens:
        """Choose by a given salience.

        Args:
            tokens: the input.
            salience: [B,N] float >= 0.

        Returns:
            The chosen tokens, in order.
        """
        counts = self.counts(tokens)
        slots = self.slots(tokens, counts)
        free, kept = tokens.mask, torch.zeros_like(tokens.mask)
        if tokens.protected is not None:
            free, kept = tokens.mask & ~tokens.protected, tokens.mask & tokens.protected
        wanted = counts - kept.sum(1)
        order = pick_order(unit_metric(tokens), salience, free, width(wanted, slots), self.alpha)
        return prune(tokens, kept | (order < wanted[:, None]), slots)

    def _salience(self, tokens: Tokens) -> Tensor:
        if self.by == "uniform":
            return tokens.mask.float()
        return low_entropy(tokens) if self.by == "salience" else mean_received(tokens)


@torch.no_grad()
def pick_order(unit: Tensor, salience: Tensor, mask: Tensor, picks: int, alpha: float = 1.0) -> Tensor:
    """When each token is picked.

    Exact, and lazy in the sense that a pick only touches the rows i whose coverage it raises: their share
    falls as 1 / picks, so all picks together cost a few passes over S, where naive greedy takes one pass
    per pick. Ties go to the higher salience, then to the lower index.

    Args:
        unit: [B,N,M] float, of length 1 or zero.
        salience: [B,N] float >= 0.
        mask: [B,N] bool, what may be picked and must be covered.
        picks: K.
        alpha: exponent of the salience.

    Returns:
        [B,N] long in [0,K), or N if it is not picked.
    """
    B, N = mask.shape
    unit = unit.masked_fill(~mask.unsqueeze(-1), 0.0)
    with torch.autocast(unit.device.type, enabled=False):
        similarity = torch.bmm(unit, unit.transpose(1, 2))
    preference = salience.double().masked_fill(~mask, 0.0).pow(alpha)
    gain = similarity.clamp(min=0.0).sum(1, dtype=torch.float64)
    cover = similarity.new_zeros(B, N)
    open_ = mask.clone()
    order = torch.full_like(mask, N, dtype=torch.long)
    nothing = NO_GAIN * mask.sum(1, keepdim=True)
    for step in range(picks):
        pick = _best(gain.masked_fill(gain < nothing, 0.0) * preference, salience, open_)
        taken = open_.gather(1, pick)
        order = torch.where(taken, order.scatter(1, pick, step), order)
        open_ = open_.scatter(1, pick, False)
        raised = similarity.gather(1, pick.unsqueeze(1).expand(-1, -1, N)).squeeze(1).maximum(cover)
        raised = torch.where(taken, raised, cover)
        gain = gain - _lost(similarity, cover, raised)
        cover = raised
    return order


def _best(score: Tensor, salience: Tensor, open_: Tensor) -> Tensor:
    """[B,1] long: highest score, then highest salience, then lowest index, among the open ones."""
    score = score.masked_fill(~open_, -float("inf"))
    tied = open_ & (score == score.amax(1, keepdim=True))
    return salience.double().masked_fill(~tied, -float("inf")).argmax(1, keepdim=True)


def _lost(similarity: Tensor, cover: Tensor, raised: Tensor) -> Tensor:
    """How much of each gain [B,N] a rise of the coverage takes: its sum over the rows that rise."""
    changed = raised > cover
    if similarity.device.type == "cpu":
        rows = chosen_indices(changed, max(1, width(changed.sum(1), 1)))
        similarity = similarity.gather(1, rows.unsqueeze(-1).expand(-1, -1, similarity.shape[2]))
        # Unused places repeat row 0 with a rise of zero.
        used = torch.arange(rows.shape[1]) < changed.sum(1, keepdim=True)
        cover = cover.gather(1, rows)
        raised = torch.where(used, raised.gather(1, rows), cover)
    clamped = torch.maximum(similarity, cover.unsqueeze(-1)).minimum(raised.unsqueeze(-1))
    return (clamped - cover.unsqueeze(-1)).sum(1, dtype=torch.float64)
