"""QuickMerge while the text is read: causal salience, closing threshold, salience-weighted spans (ours)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.streaming_base import StreamingMerger, merge_spans
from qm_lightning.merging.streaming_threshold import ClosingThreshold
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

# The least weight of a token in its span's average.
EPSILON = 0.01


def causal_features(stats: AttentionStats, mask: Tensor) -> Tensor:
    """What attention says of a token without looking ahead.

    Args:
        stats: of a causal backbone; its entropy is divided by the log of the visible keys already.
        mask: [B,N] bool.

    Returns:
        [2,L,B,N] float in [0,1]: low entropy, and the norm against the running mean over the prefix, as
        ``norm / (norm + mean)``.
    """
    dtype = torch.promote_types(stats.entropy.dtype, torch.float32)
    norm = stats.norm.to(dtype).masked_fill(~mask, 0.0)
    mean = norm.cumsum(dim=-1) / mask.cumsum(dim=-1).clamp(min=1)
    relative = norm / (norm + mean).clamp(min=torch.finfo(dtype).tiny)
    return torch.stack([1.0 - stats.entropy.to(dtype), relative])


class StreamingQuickMerge(StreamingMerger):
    """A span closes with each token whose salience exceeds a threshold; it becomes their weighted mean.

    Salience is a weighted mean of low attention entropy and relative norm over the chosen layers, by default
    of low entropy alone (spec quickmerge.md, section 2, causal mode). No statistic of the sequence enters it.

    Args:
        budget: ``FixedBudget(compression)``, tokens per span over all samples.
        learn_weights: make the features' weights a parameter, and add a zero-initialised linear read-out of
            LayerNorm(values).
        max_span: longest span in tokens.
        input_dim: width of the tokens; the module gives it by ``build`` otherwise.
        layers: chosen attention layers; likewise.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        learn_weights: bool = False,
        max_span: int | None = 16,
        input_dim: int | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__(budget, max_span)
        self.threshold = ClosingThreshold(self.compression, 0.5)
        self.learn_weights = learn_weights
        self.feature_weights: nn.Parameter | None = None
        self.readout: nn.Module | None = None
        if input_dim is not None:
            self.build(input_dim, layers)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the weights of features [2,L] and the read-out."""
        if not self.learn_weights or self.feature_weights is not None:
            return
        self.feature_weights = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, layers))
        linear = nn.Linear(input_dim, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.readout = nn.Sequential(nn.LayerNorm(input_dim), linear)

    @property
    def reads_attention(self) -> bool:
        """Always: salience comes from it."""
        return True

    def salience(self, tokens: Tokens) -> Tensor:
        """Causal salience, [B,N] float, in [0,1] unless learned.

        Raises:
            UserError: no attention statistics, or learned weights that were not built.
        """
        if tokens.attention is None:
            raise UserError(
                "StreamingQuickMerge needs attention statistics and found none; expected "
                "Tokens.attention; use a backbone that gives them (HFBackbone), or FixedStride"
            )
        features = causal_features(tokens.attention, tokens.mask)
        if not self.learn_weights:
            return features[0].mean(dim=0)
        if self.feature_weights is None or self.readout is None:
            raise UserError("learn_weights=True needs the width of the tokens: pass input_dim= and layers=")
        weighted = features * self.feature_weights.to(features.dtype)[:, :, None, None]
        readout = self.readout(tokens.values.to(self.feature_weights.dtype)).squeeze(-1)
        salience: Tensor = weighted.sum(dim=0).mean(dim=0) + readout
        return salience

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; in training also moves the threshold by one step."""
        salience = self.salience(tokens)
        merged = merge_spans(tokens, self.threshold(salience), salience.clamp(min=EPSILON), self.max_span)
        if self.training:
            self.threshold.adapt(salience, tokens.mask, merged.mask.sum(dim=1))
        return merged
