"""Keys and values of the tokens read so far, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """A preallocated key-value cache of a causal transformer.

    Args:
        depth: layers.
        batch: samples.
        heads: heads per layer.
        capacity: tokens that fit.
        head_dim: channels of a head, of keys and values alike.
        device: where it lies.
        dtype: of keys and values.

    Attributes:
        length: tokens held now.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (depth, batch, heads, capacity, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values behind those of before.

        Args:
            layer: index of the layer.
            keys: [B,heads,S,d], the S new tokens.
            values: [B,heads,S,d].

        Returns:
            Views of all keys and all values, [B,heads,length + S,d].
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has now written."""
        self.length += tokens
