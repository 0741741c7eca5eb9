"""All tokens, untouched: the upper end of every comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import Causality, Merger
from qm_lightning.merging.select import width
from qm_lightning.tokens import MergedTokens, Tokens


class NoMerge(Merger):
    """Keeps every valid token."""

    causality: ClassVar[Causality] = "streaming"

    def forward(self, tokens: Tokens) -> MergedTokens:
        """The valid tokens, in order, each ready when it is read."""
        kept = prune(tokens, tokens.mask, width(tokens.counts, tokens.mask.shape[1]), whole=False)
        return replace(kept, unmerged=tokens.values)
