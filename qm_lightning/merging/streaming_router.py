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

# The aimed share stays between 1 / 149 and 148 / 149.
AIM_LIMIT = 5.0


class LearnedRouter(StreamingMerger):
    """A span starts at t where ``p_t = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2`` exceeds one half.

    The first token of a span stands for it, so a merged token is ready when it is read. The ratio loss
    ``ratio`` pulls the share of starts to one over the compression. H-Net smooths the decoded chunks by
    their confidence; here the straight-through weight of each token in its span carries the router's
    gradient instead.

    The loss alone gives way where the prior gains by more tokens (1.1 to 1.8 times fewer where 2.37 was asked for). So
    the share that it aims at is not fixed: a controller lowers it while there are more starts than wanted, over all
    samples, and raises it while there are fewer (ours). The rule of a start stays H-Net's.

    Args:
        budget: ``FixedBudget(compression)``.
        ratio_weight: of the ratio loss (H-Net: 0.03, over far more steps).
        gain: how far the logit of the aim moves when there are twice as many starts as wanted.
        input_dim: width of the tokens; the module gives it by ``build`` otherwise.
    """

    aim: Tensor

    def __init__(
        self,
        budget: Budget | None = None,
        ratio_weight: float = 1.0,
        gain: float = 0.1,
        input_dim: int | None = None,
    ) -> None:
        super().__init__(budget)
        self.ratio_weight, self.gain = ratio_weight, gain
        share = torch.tensor(1.0 / max(self.compression, 1.0 + 1e-6), dtype=torch.float64)
        self.register_buffer("aim", share.logit().clamp(-AIM_LIMIT, AIM_LIMIT))
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
            share = self.start_share(starts, tokens.mask)
            losses["ratio"] = self.ratio_weight * self.ratio_loss(p, share, tokens.mask)
            self.adapt(share)
        return select_starts(tokens, starts, p, losses)

    @staticmethod
    def start_share(starts: Tensor, mask: Tensor) -> Tensor:
        """Share of the valid tokens of all ranks that start a span; both [B,N] bool, a scalar float64."""
        seen = torch.stack([(starts & mask).sum(), mask.sum()]).double()
        (chosen, valid), _ = sum_over_ranks(seen)
        share: Tensor = chosen / valid
        return share

    def ratio_loss(self, p: Tensor, share: Tensor, mask: Tensor) -> Tensor:
        """``F G / A + (1 - F) (1 - G) / (1 - A)``: F the share of starts, G the mean of p, A the share aimed at.

        With A = 1 / N it is H-Net's loss, 1 where F and G are A. F is that of all ranks and has no gradient, so the
        loss is linear in G, and DDP's average over ranks is right.

        Args:
            p: [B,N] float.
            share: F.
            mask: [B,N] bool.

        Returns:
            Scalar.
        """
        G = global_mean(p.masked_fill(~mask, 0.0).sum(), mask.sum())
        F_share, A = share.to(p.dtype), self.aim.sigmoid().to(p.dtype)
        loss: Tensor = F_share * G / A + (1 - F_share) * (1 - G) / (1 - A)
        return loss

    @torch.no_grad()
    def adapt(self, share: Tensor) -> None:
        """Move the aim by one step, the same on every rank."""
        excess = (share * self.compression - 1.0).clamp(max=1.0)
        self.aim.sub_(self.gain * excess).clamp_(-AIM_LIMIT, AIM_LIMIT)
