"""Spans of fixed length."""

from __future__ import annotations

import torch

from qm_lightning.merging.streaming_base import StreamingMerger, merge_spans
from qm_lightning.tokens import MergedTokens, Tokens


class FixedStride(StreamingMerger):
    """Averages spans of ``compression`` tokens; a fraction alternates two lengths.

    Args:
        budget: ``FixedBudget(compression)``.
    """

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch."""
        read = tokens.mask.long().cumsum(dim=1).double()
        # A hair more, so that 3 x (1 / 3) counts as 1.
        done = (read / self.compression + 1e-9).floor()
        before = ((read - 1) / self.compression + 1e-9).floor()
        weights = torch.ones_like(read, dtype=torch.promote_types(tokens.values.dtype, torch.float32))
        return merge_spans(tokens, done > before, weights)
