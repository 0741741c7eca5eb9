"""QuickMerge++: anchors by salience, the rest joins the nearest anchor (spec quickmerge.md, section 4)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.base import Causality, Merger, assemble, chosen_indices, top_mask, width
from qm_lightning.merging.budget import Budget, EntropyBudget
from qm_lightning.merging.noise import gumbel
from qm_lightning.merging.salience import Salience
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens


class QuickMerge(Merger):
    """Salience-weighted merging around the K most salient tokens.

    Args:
        budget: tokens kept per sample; default ``EntropyBudget(2.37)``.
        learn_weights: learn the weights of the salience features and a read-out of the values.
        locality: price of distance when a token chooses its anchor; distance 1 is the grid's diagonal.
        noise_scale: of the Gumbel noise on the choice of anchors in training.
        gate_temperature: of the gate's gradient.
        eps: mass of a token that is no anchor (and the least mass of an anchor).
        seed: of the noise.
        input_dim: width of the tokens, for ``learn_weights`` outside a QuickMergeModule.
        layers: attention layers, likewise.
    """

    causality: ClassVar[Causality] = "global"
    calls: Tensor

    def __init__(
        self,
        budget: Budget | None = None,
        learn_weights: bool = False,
        locality: float = 0.1,
        noise_scale: float = 0.1,
        gate_temperature: float = 0.1,
        eps: float = 0.01,
        seed: int = 0,
        input_dim: int | None = None,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        self.budget = budget or EntropyBudget()
        self.salience = Salience(learn_weights)
        self.locality, self.noise_scale, self.gate_temperature = locality, noise_scale, gate_temperature
        self.eps, self.seed = eps, seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        if input_dim is not None:
            self.build(input_dim, layers or 1)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the salience's parameters, once."""
        if self.salience.weight is None:
            self.salience.build(input_dim, layers)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; gradients reach values and salience."""
        return self.merge(tokens, self.salience(tokens))

    def merge(self, tokens: Tokens, salience: Tensor) -> MergedTokens:
        """Merge by a given salience [B,N]."""
        mask = tokens.mask
        counts = self.budget(salience, mask)
        if tokens.protected is not None:
            others = mask & ~tokens.protected
            need = (tokens.protected & mask).sum(1) + others.any(1).long()
            counts = counts.maximum(need)
        scores = self._noisy(salience, tokens)
        chosen = top_mask(scores, mask, counts, tokens.protected)
        slots = width(
            counts, min(mask.shape[1], self.budget.bound(mask.shape[1]) + self._protected_bound(tokens))
        )
        anchors = chosen_indices(chosen, slots)
        assignment = self._group(tokens, chosen, anchors, counts)
        gate = chosen.to(salience.dtype) + self._soft_gate(scores, chosen, mask)
        mass = gate * salience.clamp(min=self.eps) + (1.0 - gate) * self.eps
        return assemble(tokens, assignment, mass, anchors, counts, whole=False)

    @staticmethod
    def _protected_bound(tokens: Tokens) -> int:
        return 0 if tokens.protected is None else tokens.mask.shape[1]

    def _noisy(self, salience: Tensor, tokens: Tokens) -> Tensor:
        if not (self.training and self.noise_scale > 0):
            return salience
        seeds = tokens.seeds
        if seeds is None:
            rows = torch.arange(salience.shape[0], device=salience.device)
            seeds = self.calls * 1_000_003 + rows
            self.calls += 1
        return salience + self.noise_scale * gumbel(seeds, salience.shape[1], self.seed).to(salience.dtype)

    def _soft_gate(self, scores: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
        """Zero in the forward pass; the gradient of a sigmoid around the border between kept and merged."""
        if not scores.requires_grad:
            return torch.zeros_like(scores)
        low = scores.masked_fill(~chosen, float("inf")).amin(1, keepdim=True)
        rest = scores.masked_fill(chosen | ~mask, -float("inf")).amax(1, keepdim=True)
        border = torch.where(rest.isfinite(), 0.5 * (low + rest), low - self.gate_temperature)
        soft = torch.sigmoid((scores - border.detach()) / self.gate_temperature)
        return soft - soft.detach()

    @torch.no_grad()
    def _group(self, tokens: Tokens, chosen: Tensor, anchors: Tensor, counts: Tensor) -> Tensor:
        """Group of each token: its own if it is an anchor, else the most similar and nearest anchor's."""
        metric = tokens.values if tokens.metric is None else tokens.metric
        metric = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)
        picked = metric.gather(1, anchors.unsqueeze(-1).expand(-1, -1, metric.shape[-1]))
        with torch.autocast(metric.device.type, enabled=False):
            affinity = torch.bmm(metric, picked.transpose(1, 2))
        if self.locality > 0:
            affinity -= self.locality * _distance(tokens, anchors, affinity.dtype)
        closed = torch.arange(anchors.shape[1], device=counts.device) >= counts[:, None]
        if tokens.protected is not None:
            closed = closed | tokens.protected.gather(1, anchors)
        nearest = affinity.masked_fill(closed.unsqueeze(1), -float("inf")).argmax(-1)
        own = chosen.long().cumsum(1) - 1
        return torch.where(chosen, own, nearest).masked_fill(~tokens.mask, -1)

    @classmethod
    def compress(
        cls,
        hidden_states: Tensor,
        attention: AttentionStats | tuple[Tensor, ...],
        mask: Tensor | None = None,
        budget: Budget | None = None,
    ) -> MergedTokens:
        """Merge hidden states of any model in one call.

        Args:
            hidden_states: [B,N,D].
            attention: statistics, or attention matrices [B,heads,N,N], one per layer.
            mask: [B,N] bool; default: all real.
            budget: default ``EntropyBudget(2.37)``.

        Returns:
            The merged tokens.
        """
        B, N, _ = hidden_states.shape
        mask = torch.ones(B, N, dtype=torch.bool, device=hidden_states.device) if mask is None else mask
        if not isinstance(attention, AttentionStats):
            attention = _stats(attention, mask)
        positions = torch.arange(N, device=hidden_states.device).expand(B, N).unsqueeze(-1)
        merger = cls(budget=budget).to(hidden_states.device).eval()
        merged: MergedTokens = merger(Tokens(hidden_states, mask, positions, attention))
        return merged


def _stats(matrices: tuple[Tensor, ...], mask: Tensor) -> AttentionStats:
    """Statistics of materialised attention matrices [B,heads,N,N]."""
    a = torch.stack(matrices).double()
    visible = ((a > 0).any(2) & mask[:, None, :]).sum(-1).clamp(min=1)
    entropy = -torch.xlogy(a, a).sum(-1).mean(2) / visible.double().log().clamp(min=1e-12)
    entropy = torch.where(visible > 1, entropy, 0.0).clamp(0, 1).float()
    return AttentionStats(entropy, torch.zeros_like(entropy), a.mean(2).sum(-2).float())


def _distance(tokens: Tokens, anchors: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of every token to every anchor, [B,N,K]; 1 = the diagonal of the sample's grid."""
    where = tokens.positions.to(dtype)
    real = tokens.mask.unsqueeze(-1)
    low = where.masked_fill(~real, float("inf")).amin(1)
    high = where.masked_fill(~real, -float("inf")).amax(1)
    diagonal = (high - low).square().sum(-1).sqrt().clamp(min=1.0)
    at = where.gather(1, anchors.unsqueeze(-1).expand(-1, -1, where.shape[-1]))
    return torch.cdist(where, at) / diagonal[:, None, None]
