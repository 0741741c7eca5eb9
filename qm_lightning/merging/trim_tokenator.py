"""TrimTokenator: tokens that fit the text, then the most diverse of them (spec reduction.md, section 6)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.grouping import unit_metric
from qm_lightning.merging.select import top_mask, width
from qm_lightning.tokens import MergedTokens, Tokens

Distance = Literal["l1", "l2", "l2sq"]


class TrimTokenator(BudgetMerger):
    """Keeps the tokens nearest to the paired text, and of these the K that are least like each other.

    Without text (``Tokens.context``) the first stage is skipped. Which distance the paper means is
    disputed, so all three are here. Distances to a text near the origin favour small norms; ``normalize``
    removes that.

    Args:
        budget: tokens kept per sample; ``None``: ``FixedBudget()``.
        dist: distance between a token and the text's tokens: ``l1``, ``l2`` or ``l2sq`` (squared).
        first_share: share of the tokens that the first stage leaves (never fewer than K).
        normalize: compare vectors of length 1 in the first stage.
        require_text: refuse samples without text instead of skipping the first stage.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(
        self,
        budget: Budget | None = None,
        dist: Distance = "l2sq",
        first_share: float = 0.8,
        normalize: bool = False,
        require_text: bool = False,
    ) -> None:
        super().__init__(budget)
        if dist not in ("l1", "l2", "l2sq"):
            raise UserError(f"TrimTokenator(dist={dist!r}): expected l1, l2 or l2sq")
        if not 0.0 < first_share <= 1.0:
            raise UserError(f"TrimTokenator(first_share={first_share}): expected a share in (0, 1]")
        self.dist, self.first_share, self.normalize = dist, first_share, normalize
        self.require_text = require_text

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The chosen tokens, in order."""
        counts = self.counts(tokens)
        slots = self.slots(tokens, counts)
        free, kept = tokens.mask, torch.zeros_like(tokens.mask)
        if tokens.protected is not None:
            free, kept = tokens.mask & ~tokens.protected, tokens.mask & tokens.protected
        wanted = counts - kept.sum(1)
        pool = self._first_stage(tokens, free, wanted)
        order = most_diverse(unit_metric(tokens), pool, width(wanted, slots))
        return prune(tokens, kept | (order < wanted[:, None]), slots)

    @property
    def needs_text(self) -> bool:
        """With ``require_text``."""
        return self.require_text

    @torch.no_grad()
    def _first_stage(self, tokens: Tokens, free: Tensor, wanted: Tensor) -> Tensor:
        text = tokens.context
        if text is None:
            if self.require_text:
                raise UserError(
                    "TrimTokenator(require_text=True) got samples without text; expected Tokens.context, the "
                    "text that belongs to a picture; use paired data, or leave require_text out"
                )
            return free
        if text.values.shape[-1] != tokens.values.shape[-1]:
            raise UserError(
                f"TrimTokenator compares tokens of width {tokens.values.shape[-1]} with a text of width "
                f"{text.values.shape[-1]}; expected one space; project the text to the tokens' width"
            )
        left = (self.first_share * free.sum(1).double() + 1e-9).long().maximum(wanted)
        nearest = top_mask(-self._distance(tokens, text), free, left)
        return torch.where(text.mask.any(1, keepdim=True), nearest, free)

    def _distance(self, tokens: Tokens, text: Tokens) -> Tensor:
        """Mean distance of each token to the text's tokens, [B,N]; of ``l2sq`` up to a constant."""
        dtype = torch.promote_types(tokens.values.dtype, torch.float32)
        x = tokens.values.to(dtype).masked_fill(~tokens.mask.unsqueeze(-1), 0.0)
        t = text.values.to(dtype).masked_fill(~text.mask.unsqueeze(-1), 0.0)
        if self.normalize:
            x, t = F.normalize(x, dim=-1, eps=1e-6), F.normalize(t, dim=-1, eps=1e-6)
        words = text.counts.clamp(min=1).to(dtype)[:, None]
        if self.dist == "l2sq":
            # mean_j |v - t_j|^2 = |v - mean t|^2 + a constant of the sample.
            return (x - (t.sum(1) / words).unsqueeze(1)).square().sum(-1)
        each = torch.cdist(
            x, t, p=1.0 if self.dist == "l1" else 2.0, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return each.masked_fill(~text.mask.unsqueeze(1), 0.0).sum(-1) / words


@torch.no_grad()
def most_diverse(unit: Tensor, mask: Tensor, picks: int) -> Tensor:
    """When each token is picked: first the least like all tokens, then the least like those picked.

    Likeness to a set is the mean cosine to it. No similarity matrix is held: the sum of similarities to a set
    is one product with the set's sum. The lowest index wins ties.

    Args:
        unit: [B,N,M] float, of length 1 or zero.
        mask: [B,N] bool, what may be picked.
        picks: K.

    Returns:
        [B,N] long in [0,K), or N if it is not picked.
    """
    B, N = mask.shape
    unit = unit.masked_fill(~mask.unsqueeze(-1), 0.0)
    order = torch.full_like(mask, N, dtype=torch.long)
    open_ = mask.clone()
    with torch.autocast(unit.device.type, enabled=False):
        likeness = torch.bmm(unit, unit.sum(1).unsqueeze(-1)).squeeze(-1)
        total = torch.zeros_like(likeness)
        for step in range(picks):
            pick = likeness.masked_fill(~open_, float("inf")).argmin(1, keepdim=True)
            taken = open_.gather(1, pick)
            order = torch.where(taken, order.scatter(1, pick, step), order)
            open_ = open_.scatter(1, pick, False)
            picked = unit.gather(1, pick.unsqueeze(-1).expand(B, 1, unit.shape[-1]))
            total = total + torch.bmm(unit, picked.transpose(1, 2)).squeeze(-1)
            likeness = total
    return order
