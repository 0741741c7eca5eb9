"""PiToMe: merging where tokens crowd (spec reduction.md, section 7)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.assemble import merge_into, own_sizes
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.bipartite import Lanes, match
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.select import width
from qm_lightning.tokens import MergedTokens, Tokens

ROWS_AT_ONCE = 512  # of the similarity matrix, which is never held whole


class PiToMe(BudgetMerger):
    """Merges the tokens of highest energy, those in the densest clusters, and leaves the others alone.

    Args:
        budget: tokens left per sample; ``None``: ``FixedBudget()``.
        margin: cosine similarity from which on a neighbour raises the energy; the published one falls from
        0.75
            in the first layer of a backbone to 0 after the last.
        rounds: least number of matchings, see ``ToMe``.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(self, budget: Budget | None = None, margin: float = 0.5, rounds: int = 1) -> None:
        super().__init__(budget)
        self.margin, self.rounds = margin, rounds

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Size-weighted averages in the order of the token that pairs were merged into; ready at the end."""
        counts = self.counts(tokens)
        parent = match(tokens, counts, self.budget, pairing=self._pair, rounds=self.rounds)
        return merge_into(tokens, parent, own_sizes(tokens), self.slots(tokens, counts), whole=True)

    def _pair(self, lanes: Lanes, remove: Tensor) -> Tensor:
        """Of the 2 r tokens of highest energy those of even rank join the most similar one of odd rank."""
        unit = F.normalize(lanes.metric, dim=-1, eps=1e-6)
        n = lanes.alive.shape[1]
        score = energy(unit, lanes.alive, self.margin).masked_fill(~lanes.alive, -float("inf"))
        order = score.argsort(dim=1, descending=True, stable=True)
        r = width(remove, n // 2)
        source, destination = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
        real = torch.arange(r, device=remove.device) < remove[:, None]
        with torch.autocast(unit.device.type, enabled=False):
            similarity = torch.bmm(_rows(unit, source), _rows(unit, destination).transpose(1, 2))
        partner = similarity.masked_fill_(~real[:, None, :], -float("inf")).argmax(-1)
        joined = torch.where(real, destination.gather(1, partner), source)
        lane = torch.arange(n, device=remove.device).expand(lanes.alive.shape)
        return lane.scatter(1, source, joined)


def energy(unit: Tensor, mask: Tensor, margin: float) -> Tensor:
    """``E_i = mean_j ELU(cos_ij - margin)`` over all valid j, i itself included.

    Args:
        unit: [B,N,M] float, of length 1, zero for padding.
        mask: [B,N] bool.
        margin: of the similarity.

    Returns:
        [B,N] float.
    """
    parts = []
    columns = mask.unsqueeze(1)
    with torch.autocast(unit.device.type, enabled=False):
        for rows in torch.split(unit, ROWS_AT_ONCE, dim=1):
            raised = F.elu(torch.bmm(rows, unit.transpose(1, 2)) - margin)
            parts.append(raised.masked_fill(~columns, 0.0).sum(-1))
    return torch.cat(parts, 1) / mask.sum(1, keepdim=True).clamp(min=1).to(unit.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
