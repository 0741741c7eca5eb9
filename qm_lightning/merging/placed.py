"""A modality's place in the input of a prior that reads several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qm_lightning.merging.base import Merger
from qm_lightning.tokens import MergedTokens, Tokens


@dataclass(frozen=True)
class Block:
    """A modality's own coordinates in the prior's input; the others are zero.

    The prior's first layer then has weights of its own for every modality, and nothing between a frozen backbone
    and the alignment targets can be learned, so these cannot collapse.
    """

    before: int
    after: int

    def place(self, values: Tensor) -> Tensor:
        """[...,D] -> [..., before + D + after]."""
        return F.pad(values, (self.before, self.after))


class PlacedMerger:
    """A modality's merger whose output has the width of the prior."""

    def __init__(self, merger: Merger, block: Block) -> None:
        self._merger, self._block = merger, block
        self.inside = getattr(merger, "inside", False)

    def __call__(self, tokens: Tokens) -> MergedTokens:
        """Merge the backbone's tokens."""
        return self._placed(self._merger(tokens))

    def read(self, backbone: Any, inputs: dict[str, Tensor]) -> Tokens:
        """As ``Merger.read``."""
        return self._merger.read(backbone, inputs)

    def encode(self, backbone: Any, inputs: dict[str, Tensor], plain: Tokens | None = None) -> MergedTokens:
        """As ``Merger.encode``."""
        return self._placed(self._merger.encode(backbone, inputs, plain))

    def _placed(self, merged: MergedTokens) -> MergedTokens:
        return replace(merged, values=self._block.place(merged.values))
