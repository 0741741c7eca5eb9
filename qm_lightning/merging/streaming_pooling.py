"""Spans from a boundary predictor under a prior: dynamic pooling (spec reduction.md, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.noise import uniform
from qm_lightning.merging.streaming_base import StreamingMerger, cap_spans, merge_spans
from qm_lightning.merging.streaming_threshold import ClosingThreshold
from qm_lightning.ranks import global_mean
from qm_lightning.tokens import MergedTokens, Tokens


class DynamicPooling(StreamingMerger):
    """Closes a span with token t where a small network on h_t says so, and averages the span.

    In training the decision is drawn (Gumbel-sigmoid, from the sample's seed and the token's index), and the
    loss ``boundaries`` is the binomial negative log-likelihood of their number per token, with one over the
    compression as the chance of each. The network's gradient is that of each token's weight in its span
    (straight-through; ours).

    In evaluation nothing is drawn, and a boundary as likely as the prior says would never exceed one half: spans
    would end at ``max_span`` alone. The likeliest tokens close them instead, those above a threshold at which the
    network's undrawn decisions of the training met the compression (ours).

    Args:
        budget: ``FixedBudget(compression)``.
        temperature: of the Gumbel-sigmoid.
        prior_weight: of the loss.
        max_span: longest span in tokens.
        seed: of the draws.
        input_dim: width of the tokens; the module gives it by ``build`` otherwise.
    """

    calls: Tensor

    def __init__(
        self,
        budget: Budget | None = None,
        temperature: float = 0.5,
        prior_weight: float = 1.0,
        max_span: int | None = 16,
        seed: int = 0,
        input_dim: int | None = None,
    ) -> None:
        super().__init__(budget, max_span)
        self.temperature, self.prior_weight, self.seed = temperature, prior_weight, seed
        self.norm: nn.LayerNorm | None = None
        self.predictor: nn.Module | None = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.threshold = ClosingThreshold(self.compression, 0.0)
        if input_dim is not None:
            self.build(input_dim, 0)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the boundary predictor, which begins at the prior."""
        if self.predictor is not None:
            return
        self.norm = nn.LayerNorm(input_dim)
        last = nn.Linear(input_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -math.log(max(self.compression - 1.0, 1e-6)))
        self.predictor = nn.Sequential(nn.Linear(input_dim, input_dim), nn.GELU(), last)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch.

        Raises:
            UserError: the predictor was not built.
        """
        if self.norm is None or self.predictor is None:
            raise UserError("DynamicPooling needs the width of the tokens: pass input_dim=")
        logits = self.predictor(self.norm(tokens.values.to(self.norm.weight.dtype))).squeeze(-1)
        if not self.training:
            return merge_spans(tokens, self.threshold(logits), torch.ones_like(logits), self.max_span)
        p = ((logits + self._noise(tokens).to(logits.dtype)) / self.temperature).sigmoid()
        closes = p > 0.5 if self.compression > 1.0 else torch.ones_like(tokens.mask)
        losses = {}
        if self.compression > 1.0:
            chosen = closes.to(p.dtype) + (p - p.detach())
            losses["boundaries"] = self.prior_weight * self.boundary_loss(chosen, tokens.mask)
            self._adapt(logits, tokens.mask)
        return merge_spans(tokens, closes, 1.0 + (p - p.detach()), self.max_span, losses)

    def _adapt(self, logits: Tensor, mask: Tensor) -> None:
        """Move the threshold of the evaluation by one step; logits [B,N], mask [B,N] bool."""
        spans = cap_spans(self.threshold(logits), self.max_span) & mask
        self.threshold.adapt(logits, mask, spans.sum(dim=1))

    def _noise(self, tokens: Tokens) -> Tensor:
        """Logistic noise [B,N]: the difference of two Gumbel draws."""
        seeds = tokens.seeds
        if seeds is None:
            seeds = self.calls * 1_000_003 + torch.arange(len(tokens.mask), device=self.calls.device)
            self.calls += 1
        return uniform(seeds, tokens.mask.shape[1], self.seed).logit()

    def boundary_loss(self, chosen: Tensor, mask: Tensor) -> Tensor:
        """``-log Binomial(boundaries; tokens, 1 / compression)`` per token, over samples.

        Args:
            chosen: [B,N] float, 1 = boundary.
            mask: [B,N] bool.

        Returns:
            Scalar, nats per token.
        """
        chance = 1.0 / self.compression
        n = mask.sum(dim=1).to(chosen.dtype)
        k = chosen.masked_fill(~mask, 0.0).sum(dim=1)
        choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        nll = -(choices + k * math.log(chance) + (n - k) * math.log1p(-chance))
        return global_mean(nll.sum(), mask.sum())
