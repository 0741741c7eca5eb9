"""How much each token matters, from the backbone's own attention (spec quickmerge.md, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.tokens import AttentionStats, Tokens

FEATURES = ("low entropy", "norm", "received")


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


class Salience(nn.Module):
    """Mean over layers of a weighted sum of scaled features; by default the features are low entropy alone.

    Args:
        learn: make the weights a parameter, and add a zero-initialised linear read-out of LayerNorm(values).
    """

    def __init__(self, learn: bool = False) -> None:
        super().__init__()
        self.learn = learn
        self.weight: nn.Parameter | None = None
        self.readout: nn.Module | None = None

    def build(self, input_dim: int, layers: int) -> None:
        """Make the parameters: weights [L,3] and the read-out of width ``input_dim``."""
        if not self.learn:
            return
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).repeat(layers, 1))
        linear = nn.Linear(input_dim, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.readout = nn.Sequential(nn.LayerNorm(input_dim), linear)

    def forward(self, tokens: Tokens) -> Tensor:
        """Salience of every token.

        Args:
            tokens: with attention statistics.

        Returns:
            [B,N] float32 (float64 for float64 statistics), 0 for padding; in [0,1] unless learned.

        Raises:
            UserError: no statistics, or parameters that were not built.
        """
        if tokens.attention is None:
            raise UserError(
                "salience needs the backbone's attention statistics and found none; expected Tokens.attention; "
                "use a backbone that gives them (HFBackbone), or a merger without salience (ToMe, UniformPool)"
            )
        if not self.learn:
            return self._low_entropy(tokens.attention, tokens.mask)
        if self.weight is None or self.readout is None:
            raise UserError("learn_weights=True needs the width of the tokens: pass input_dim= and layers=")
        features = self._features(tokens.attention, tokens.mask)
        s = torch.einsum("lf,flbn->bn", self.weight.to(features.dtype), features) / features.shape[1]
        readout: Tensor = self.readout(tokens.values.to(self.weight.dtype)).squeeze(-1)
        return (s + readout).masked_fill(~tokens.mask, 0.0)

    @staticmethod
    def _low_entropy(stats: AttentionStats, mask: Tensor) -> Tensor:
        dtype = torch.promote_types(stats.entropy.dtype, torch.float32)
        return scaled(1.0 - stats.entropy.to(dtype), mask).mean(0)

    @staticmethod
    def _features(stats: AttentionStats, mask: Tensor) -> Tensor:
        dtype = torch.promote_types(stats.entropy.dtype, torch.float32)
        received = torch.zeros_like(stats.norm) if stats.received is None else stats.received
        rows = torch.stack([1.0 - stats.entropy.to(dtype), stats.norm.to(dtype), received.to(dtype)])
        return scaled(rows, mask)
