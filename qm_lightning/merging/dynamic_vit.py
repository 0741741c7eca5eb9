"""DynamicViT: a learned predictor decides which tokens to keep (spec reduction.md, section 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.noise import Noise
from qm_lightning.merging.select import top_mask
from qm_lightning.tokens import MergedTokens, Tokens

LEAK = 1e-4  # how much a dropped token weighs in training: its gate's gradient is divided by it


class KeepPredictor(nn.Module):
    """Half of the features of each token and half of their mean over the sample -> (keep, drop).

    Args:
        dim: D, width of a token, divisible by 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise UserError(f"DynamicViT: tokens of width {dim}; expected a multiple of 4")
        self.features = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
        )

    def forward(self, values: Tensor, mask: Tensor, policy: Tensor | None = None) -> Tensor:
        """Log-odds of keeping each token.

        Args:
            values: [B,N,D] float.
            mask: [B,N] bool, the tokens that count in the mean.
            policy: [B,N] float, how much each of them counts; ``None``: all alike.

        Returns:
            [B,N] float32 or better.
        """
        values = values.masked_fill(~mask.unsqueeze(-1), 0.0).to(next(self.parameters()).dtype)
        with torch.autocast(values.device.type, enabled=False):  # in bfloat16 scores tie
            own, shared = self.features(values).chunk(2, dim=-1)
            real = (mask if policy is None else policy * mask).unsqueeze(-1).to(shared.dtype)
            mean = (shared * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1.0)
            keep, drop = self.decide(torch.cat([own, mean.expand_as(shared)], dim=-1)).unbind(-1)
        log_odds: Tensor = keep - drop
        return log_odds.to(torch.promote_types(log_odds.dtype, torch.float32))


class DynamicViT(BudgetMerger):
    """Keeps the K tokens of highest keep-probability.

    In training each token draws a straight-through Gumbel gate, and all N tokens leave the merger: a dropped
    one has the size ``LEAK`` in place of its own. The size weighs a token in the prior's attention, so this is
    the published mask: next to nobody sees a dropped token, and its gate gets the gradient of being seen.
    (Where only kept tokens leave, the predictor never learns that a dropped one was missing: on digit scenes it
    then preferred the background.) In evaluation dropped tokens are gone.

    Args:
        budget: tokens kept per sample; ``None``: ``FixedBudget()``.
        input_dim: D; ``None``: known when ``build`` is called.
        ratio_weight: of the ratio loss.
        temperature: of the gate's gradient.
        seed: of the noise.
    """

    causality: ClassVar[Causality] = "ordered"

    def __init__(
        self,
        budget: Budget | None = None,
        input_dim: int | None = None,
        ratio_weight: float = 2.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget)
        self.ratio_weight, self.temperature = ratio_weight, temperature
        self.noise = Noise(seed)
        self.predictor: KeepPredictor | None = None
        if input_dim is not None:
            self.build(input_dim, 0)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the predictor, once."""
        if self.predictor is None:
            self.predictor = KeepPredictor(input_dim)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The kept tokens, in order; in training all of them, the dropped ones faint, with the loss ``ratio``."""
        if self.predictor is None:
            raise UserError("DynamicViT needs the width of the tokens: pass input_dim=")
        free = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
        scores = self.predictor(tokens.values, free)
        counts = self.counts(tokens)
        if not self.training:
            chosen = top_mask(scores, tokens.mask, counts, tokens.protected)
            return prune(tokens, chosen, self.slots(tokens, counts))
        gates = self._gates(scores + self.noise.logistic(tokens).to(scores.dtype), free)
        loss = self._ratio_loss(gates, free, counts - (tokens.mask & ~free).sum(1))
        # A real token stays where it is, so gates fit the merged tokens as they are.
        merged = prune(tokens, tokens.mask, tokens.mask.shape[1])
        seen = torch.where(free, LEAK + (1.0 - LEAK) * gates, 1.0)
        dropped = free & (gates.detach() < 0.5)
        return replace(merged, size=merged.size * seen, losses={"ratio": loss}, faint=dropped)

    def decide(self, tokens: Tokens, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of one stage between the layers of a backbone, where dropped tokens stay in the tensor.

        Args:
            tokens: all of them, with ``keep``.
            policy: [B,N] float, the gates of the stage before: what was dropped stays dropped.

        Returns:
            The gates [B,N], 0 or 1 with a gradient, at least one free token open; and the ratio loss.
        """
        if self.predictor is None or tokens.keep is None:
            raise UserError("DynamicViT.decide needs a predictor (input_dim=) and Tokens.keep")
        free = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
        scores = self.predictor(tokens.values, free, policy)
        if self.training:
            scores = scores + self.noise.logistic(tokens).to(scores.dtype)
            gates = self._gates(scores, free)
        else:
            left = (policy > 0) & free
            room = tokens.keep.counts - (tokens.mask & ~free).sum(1)
            gates = top_mask(scores, left, room.minimum(left.sum(1))).to(scores.dtype)
        best = scores.detach().masked_fill(~(free & (policy > 0)), -float("inf")).argmax(1, keepdim=True)
        gates = gates * policy
        none = (gates * free).sum(1, keepdim=True) == 0
        gates = torch.where(none & free, torch.zeros_like(gates).scatter(1, best, 1.0), gates)
        loss = self._ratio_loss(gates * free, free, tokens.keep.counts - (tokens.mask & ~free).sum(1))
        return torch.where(free, gates, tokens.mask.to(gates.dtype)), loss

    def _gates(self, scores: Tensor, free: Tensor) -> Tensor:
        """1 where a token is kept with its noise, the gradient of the sigmoid everywhere."""
        soft = torch.sigmoid(scores / self.temperature)
        return torch.where(free, (scores > 0).to(soft.dtype) + (soft - soft.detach()), 0.0)

    def _ratio_loss(self, gates: Tensor, free: Tensor, wanted: Tensor) -> Tensor:
        total = free.sum(1).clamp(min=1).to(gates.dtype)
        return self.ratio_weight * (wanted / total - gates.sum(1) / total).square().mean()
