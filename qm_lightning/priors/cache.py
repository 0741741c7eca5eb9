"""Keys and values of the tokens read so far, allocated ahead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """A preallocated key-value cache of a causal transformer, in which every sample has its own length.

    Slots that were not written hold the bias of padding in their last key channels (``transformer.py``), so
    they weigh nothing, and no mask is needed where samples differ in length.

    Args:
        depth: layers.
        batch: samples.
        heads: heads per layer.
        capacity: tokens that fit; ``reserve`` makes room for more.
        head_dim: channels of a head, of keys and values alike.
        empty: [channels], what the last channels of an unwritten key hold.

    Attributes:
        lengths: [B] long, tokens held of each sample.
        extent: the largest of them.
    """

    def __init__(
        self, depth: int, batch: int, heads: int, capacity: int, head_dim: int, empty: Tensor
    ) -> None:
        self.keys = empty.new_zeros(depth, batch, heads, 0, head_dim)
        self.values = empty.new_zeros(depth, batch, heads, 0, head_dim)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=empty.device)
        self.extent = 0
        self._empty = empty
        self._rows = torch.arange(batch, device=empty.device)
        self.reserve(capacity)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens of each sample; what is held stays."""
        more = capacity - self.keys.shape[3]
        if more > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.keys[..., -more:, -self._empty.shape[0] :] = self._empty
            self.values = F.pad(self.values, (0, 0, 0, more))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values behind those of before.

        Args:
            layer: index of the layer.
            keys: [B,heads,S,d], the S new tokens; S > 1 only where all samples hold ``extent`` tokens.
            values: [B,heads,S,d].

        Returns:
            Views of all keys and all values, [B,heads,extent + S,d].
        """
        end = self.extent + keys.shape[2]
        held_keys, held_values = self.keys[layer], self.values[layer]
        if self.extent == 0 or keys.shape[2] > 1:
            held_keys[:, :, self.extent : end] = keys
            held_values[:, :, self.extent : end] = values
        else:
            held_keys[self._rows, :, self.lengths] = keys[:, :, 0]
            held_values[self._rows, :, self.lengths] = values[:, :, 0]
        return held_keys[:, :, :end], held_values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Keep the last ``tokens`` tokens that every layer wrote, in all samples."""
        self.lengths = self.lengths + tokens
        self.extent += tokens

    def advance_some(self, tokens: Tensor) -> None:
        """Keep the first ``tokens`` [B] long of what was written; the rest is written over next.

        Reads the largest length on the host.
        """
        self.lengths = self.lengths + tokens
        self.extent = int(self.lengths.max())
