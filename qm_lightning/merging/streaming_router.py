"""A learned router that starts a span where the text changes: H-Net's rule (spec reduction.md, section 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.streaming_base import StreamingMerger, select_starts
from qm_lightning.ranks import global_mean, sum_over_ranks
from qm_lightning.tokens import MergedTokens, Tokens


class LearnedRouter(StreamingMerger):
    """A span starts at t where ``p_t = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2`` exceeds one half.

    The first token of a span stands for it, so a merged token is ready when it is read. The ratio loss
    ``ratio`` pulls the share of starts to one over the compression. H-Net smooths the decoded chunks by
    their confidence; here the straight-through weight of each token in its span carries the router's
    gradient instead.

    Args:
        budget: ``FixedBudget(compression)``.
        ratio_weight: of the ratio loss.
        input_dim: width of the tokens; the module gives it by ``build`` otherwise.
    """

    def __init__(
        self, budget: Budget | None = None, ratio_weight: float = 0.03, input_dim: int | None = None
    ) -> None:
        super().__init__(budget)
        self.ratio_weight = ratio_weight
        self.query: nn.Linear | None = None
        self.key: nn.Linear | None = None
        if input_dim is not None:
            self.build(input_dim, 0)

    def build(self, input_dim: int, layers: int) -> None:
        """Make ``W_q`` and ``W_k``, identities to begin with: a plain similarity of neighbours."""
        if self.query is None:
            self.query, self.key = (nn.Linear(input_dim, input_dim, bias=False) for _ in range(2))
            for linear in (self.query, self.key):
                nn.init.eye_(linear.weight)

    def probability(self, values: Tensor) -> Tensor:
        """Of a start at each token, [B,N,D] -> [B,N] in [0,1], 1 for the first.

        Raises:
            UserError: the projections were not built.
        """
        if self.query is None or self.key is None:
            raise UserError("LearnedRouter needs the width of the tokens: pass input_dim=")
        values = values.to(self.query.weight.dtype)
        before, here = self.query(values[:, :-1]), self.key(values[:, 1:])
        p = (1.0 - F.cosine_similarity(before, here, dim=-1, eps=1e-6)) / 2.0
        return F.pad(p, (1, 0), value=1.0)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch."""
        p = self.probability(tokens.values)
        starts = p > 0.5 if self.compression > 1.0 else torch.ones_like(tokens.mask)
        losses = {}
        if self.training and self.compression > 1.0:
            losses["ratio"] = self.ratio_weight * self.ratio_loss(p, starts, tokens.mask)
        return select_starts(tokens, starts, p, losses)

    def ratio_loss(self, p: Tensor, starts: Tensor, mask: Tensor) -> Tensor:
        """``C / (C - 1) * ((C - 1) F G + (1 - F) (1 - G))`` with F the share of starts, G the mean of p.

        It is 1 where both are 1 / C. F is that of all ranks and has no gradient, so the loss is linear in G,
        and DDP's average over ranks is right.

        Args:
            p: [B,N] float.
            starts: [B,N] bool.
            mask: [B,N] bool.

        Returns:
            Scalar.
        """
        C = self.compression
        count = mask.sum()
        seen = torch.stack([(starts & mask).sum(), count]).to(p.dtype)
        (chosen, valid), _ = sum_over_ranks(seen)
        F_share = chosen / valid
        G_mean = global_mean(p.masked_fill(~mask, 0.0).sum(), count)
        loss: Tensor = C / (C - 1) * ((C - 1) * F_share * G_mean + (1 - F_share) * (1 - G_mean))
        return loss
