"""How much each token matters, from the backbone's own attention (spec quickmerge.md, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.tokens import AttentionStats, Tokens

FEATURES = ("1 - entropy", "norm", "received")
LOW_ENTROPY = (1.0, 0.0, 0.0)


class Salience(nn.Module):
    """Mean over layers of a weighted sum of scaled features: ``1 - entropy``, ``norm``, ``received``.

    Args:
        weights: of the three features, in every layer; the default is low entropy alone.
        learn: make the weights a parameter that starts there, and add a zero-initialised linear read-out of
            LayerNorm(values). The sum is standardised within each sample and squashed to (0,1) (ours): training would
            else let it grow until noise, the gate's temperature and the entropy budget mean nothing.
    """

    def __init__(self, weights: tuple[float, float, float] = LOW_ENTROPY, learn: bool = False) -> None:
        super().__init__()
        if len(weights) != len(FEATURES) or not any(weights):
            raise UserError(
                f"salience weights={weights}: expected one each for {FEATURES}, not all of them 0"
            )
        self.initial, self.learn = tuple(weights), learn
        self.weight: nn.Parameter | None = None
        self.readout: nn.Sequential | None = None

    def build(self, input_dim: int, layers: int | None) -> None:
        """Make the parameters: weights [L,3] (L = 1, shared by all layers, for ``None``) and the read-out."""
        if not self.learn or self.weight is not None:
            return
        self.weight = nn.Parameter(torch.tensor(self.initial).repeat(layers or 1, 1))
        linear = nn.Linear(input_dim, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.readout = nn.Sequential(nn.LayerNorm(input_dim), linear)

    def forward(self, tokens: Tokens) -> Tensor:
        """Salience of every token.

        Args:
            tokens: with attention statistics.

        Returns:
            [B,N] float32 (float64 for float64 statistics), 0 for padding; in [0,1] with the default weights, in
            (0,1) where they are learned.

        Raises:
            UserError: no statistics, or parameters that were not built.
        """
        stats = attention_of(tokens)
        if not self.learn:
            weight = torch.tensor([self.initial], device=tokens.mask.device)
            return self._weighted(stats, tokens.mask, weight)
        if self.weight is None or self.readout is None:
            raise UserError("learn_weights=True needs the width of the tokens: pass input_dim= (and layers=)")
        if self.weight.shape[0] not in (1, stats.entropy.shape[0]):
            raise UserError(
                f"salience was built for {self.weight.shape[0]} attention layers and got statistics of "
                f"{stats.entropy.shape[0]}; give the merger layers={stats.entropy.shape[0]}"
            )
        with torch.autocast(tokens.values.device.type, enabled=False):  # in bfloat16 scores tie
            read: Tensor = self.readout(tokens.values.to(self.weight.dtype)).squeeze(-1)
        return standardised(self._weighted(stats, tokens.mask, self.weight) + read, tokens.mask)

    def _weighted(self, stats: AttentionStats, mask: Tensor, weight: Tensor) -> Tensor:
        """Mean over layers of the weighted sum of scaled features; ``weight`` is [L,3] or [1,3]."""
        layers = stats.entropy.shape[0]
        total = torch.zeros_like(_precise(stats.entropy[0]))
        for column, start in enumerate(self.initial):
            # A learned weight that starts at 0 can do without a feature that the backbone does not give.
            used = start != 0 or (self.learn and not (column == 2 and stats.received is None))
            if used:
                rows = scaled(_precise(_feature(stats, column)), mask)
                own = weight[:, column].to(rows.dtype).expand(layers)
                total = total + torch.einsum("l,lbn->bn", own, rows) / layers
        return total


def attention_of(tokens: Tokens) -> AttentionStats:
    """The statistics of ``tokens``.

    Raises:
        UserError: there are none.
    """
    if tokens.attention is None:
        raise UserError(
            "salience needs the backbone's attention statistics and found none; expected Tokens.attention; "
            "use a backbone that gives them (HFBackbone), or a merger without salience (ToMe, UniformPool)"
        )
    return tokens.attention


def low_entropy(tokens: Tokens) -> Tensor:
    """Salience with the default weights, [B,N] float32 or better, in [0,1], 0 for padding."""
    stats = attention_of(tokens)
    return scaled(1.0 - _precise(stats.entropy), tokens.mask).mean(0)


def mean_received(tokens: Tokens) -> Tensor:
    """Attention received per query, mean over layers: [B,N] float32 or better, sums to 1 over valid tokens.

    Raises:
        UserError: the backbone gives none.
    """
    received = _precise(_received(attention_of(tokens))).masked_fill(~tokens.mask, 0.0)
    return received.mean(0) / tokens.counts.to(received.dtype)[:, None].clamp(min=1)


def scaled(feature: Tensor, mask: Tensor) -> Tensor:
    """Min-max scale over the valid tokens of each sample; a constant feature gives 0.

    Args:
        feature: [...,B,N] float.
        mask: [B,N] bool.

    Returns:
        Same shape, in [0,1], 0 for padding.
    """
    low = feature.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
    high = feature.masked_fill(~mask, -float("inf")).amax(-1, keepdim=True)
    span = high - low
    result = torch.where(span > 0, (feature - low) / span.clamp(min=torch.finfo(feature.dtype).tiny), 0.0)
    return result.masked_fill(~mask, 0.0)


def standardised(scores: Tensor, mask: Tensor) -> Tensor:
    """``sigmoid((score - mean) / deviation)`` over the valid tokens of each sample; equal scores give 0.5.

    Args:
        scores: [B,N] float.
        mask: [B,N] bool.

    Returns:
        Same shape, in (0,1), 0 for padding.
    """
    count = mask.sum(-1, keepdim=True)
    centred = (scores - scores.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / count).masked_fill(~mask, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return torch.sigmoid(centred * (variance + 1e-6).rsqrt()).masked_fill(~mask, 0.0)


def _feature(stats: AttentionStats, column: int) -> Tensor:
    if column == 0:
        return 1.0 - stats.entropy
    return stats.norm if column == 1 else _received(stats)


def _received(stats: AttentionStats) -> Tensor:
    if stats.received is None:
        raise UserError(
            "the attention received by each token is needed and was not recorded; expected "
            "AttentionStats.received; build the backbone with received=True"
        )
    return stats.received


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
