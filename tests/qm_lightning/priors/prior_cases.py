"""Random merged tokens for the tests of priors."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.tokens import MergedTokens


def make_merged(
    counts: list[int], width: int = 12, coordinates: int = 1, padding: int = 0, seed: int = 0
) -> MergedTokens:
    """One sample per count, each drawn from its own seed, so that neither batch nor padding changes it."""
    K = max(counts) + padding
    values = torch.zeros(len(counts), K, width, dtype=torch.float64)
    size = torch.zeros(len(counts), K, dtype=torch.float64)
    positions = torch.zeros(len(counts), K, coordinates, dtype=torch.long)
    for b, count in enumerate(counts):
        draw = torch.Generator().manual_seed(1000 * seed + b)
        values[b, :count] = torch.randn(count, width, generator=draw, dtype=torch.float64)
        size[b, :count] = torch.randint(1, 9, (count,), generator=draw).double()
        positions[b, :count] = torch.randint(1, 4, (count, coordinates), generator=draw).cumsum(0)
    mask = torch.arange(K) < torch.tensor(counts)[:, None]
    return from_parts(values, mask, size, positions)


def from_parts(values: Tensor, mask: Tensor, size: Tensor, positions: Tensor) -> MergedTokens:
    """Merged tokens whose provenance does not matter."""
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    assignment = index.masked_fill(~mask, -1)
    return MergedTokens(values, mask, size, positions, index, assignment, mask.double())
