"""ToFu: token fusion, pruning or norm-keeping merging of ToMe's pairs (spec reduction.md, section 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import merge_into, own_sizes, prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.bipartite import match
from qm_lightning.merging.budget import Budget
from qm_lightning.tokens import MergedTokens, Tokens

Mode = Literal["mlerp", "prune", "mean"]


class ToFu(BudgetMerger):
    """ToMe's matching with another way to fuse a group.

    Args:
        budget: tokens left per sample; ``None``: ``FixedBudget()``.
        mode: ``mlerp``: the mean's direction with the largest norm of the members, so that averaging does not
            shrink tokens; ``prune``: the token that the others would join stays as it is, the others are
            dropped; ``mean``: as ToMe.
        rounds: least number of matchings, see ``ToMe``.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(self, budget: Budget | None = None, mode: Mode = "mlerp", rounds: int = 1) -> None:
        super().__init__(budget)
        if mode not in ("mlerp", "prune", "mean"):
            raise UserError(f"ToFu(mode={mode!r}): expected mlerp, prune or mean")
        self.mode, self.rounds = mode, rounds

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Fused groups in the order of the token that each pair was merged into; ready at the end."""
        counts = self.counts(tokens)
        slots = self.slots(tokens, counts)
        carry: Literal["keep", "mean"] = "keep" if self.mode == "prune" else "mean"
        parent = match(tokens, counts, self.budget, carry=carry, rounds=self.rounds)
        if self.mode == "prune":
            own = torch.arange(parent.shape[1], device=parent.device)
            return prune(tokens, parent == own, slots)
        merged = merge_into(tokens, parent, own_sizes(tokens), slots, whole=True)
        return merged if self.mode == "mean" else keep_norm(tokens, merged)


def keep_norm(tokens: Tokens, merged: MergedTokens) -> MergedTokens:
    """MLERP: scale each average to the largest norm among its members.

    Where the average vanishes (opposite members) the member of largest norm takes its place.

    Args:
        tokens: the input.
        merged: its groups' averages.

    Returns:
        The same groups; groups of one are left as they are, bit for bit.
    """
    B, K = merged.mask.shape
    N = tokens.mask.shape[1]
    dtype = torch.promote_types(tokens.values.dtype, torch.float32)
    slot = torch.where(merged.assignment >= 0, merged.assignment, K)
    norm = torch.linalg.vector_norm(tokens.values.to(dtype), dim=-1).masked_fill(~tokens.mask, 0.0)
    largest = norm.new_zeros(B, K + 1).scatter_reduce(1, slot, norm.detach(), "amax")
    index = torch.arange(N, device=slot.device).expand(B, N)
    heavy = torch.where(norm.detach() == largest.gather(1, slot), index, N - 1)
    heavy = heavy.new_full((B, K + 1), N - 1).scatter_reduce(1, slot, heavy, "amin")[:, :K]
    members = slot.new_zeros(B, K + 1).scatter_add(1, slot, torch.ones_like(slot))[:, :K]
    mean = merged.values.to(dtype)
    length = torch.linalg.vector_norm(mean, dim=-1)
    radius = norm.gather(1, heavy)
    vanished = length < 1e-6 * radius
    scaled = mean * (radius / torch.where(length > 0, length, 1.0)).unsqueeze(-1)
    heaviest = _rows(tokens.values, heavy)
    values = torch.where(vanished.unsqueeze(-1), heaviest, scaled.to(heaviest.dtype))
    values = torch.where((members > 1).unsqueeze(-1), values, merged.values)
    return replace(merged, values=values)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [B,N,D] at ``index`` [B,K] -> [B,K,D]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
