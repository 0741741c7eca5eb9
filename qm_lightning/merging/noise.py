"""Random numbers that depend on the sample alone, not on batch, rank or restart (ours)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_lightning.tokens import Tokens

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the constants of splitmix64 as signed integers
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(x: Tensor) -> Tensor:
    """Splitmix64's finaliser, int64 -> int64, in wrapping integers: equal on every device."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(seeds: Tensor, tokens: int, seed: int) -> Tensor:
    """Uniform numbers of each token.

    Args:
        seeds: [B] long, one number per sample.
        tokens: N.
        seed: the module's own seed.

    Returns:
        [B,N] float32 in the open interval (0,1); a padded token more changes no other token's number.
    """
    row = hash64(seeds.long() ^ hash64(torch.full_like(seeds, seed, dtype=torch.long)))
    index = torch.arange(tokens, device=seeds.device)
    bits = _shift(hash64(row[:, None] + index[None, :] * _GOLDEN), 41)  # 23 bits: exact in float32
    return (bits.float() + 0.5) * 2.0**-23


class Noise(nn.Module):
    """The random numbers of a merger.

    A sample's own seed (``Tokens.seeds``) decides them. Without seeds the module counts its training calls,
    in a buffer that is saved, and all samples of a call share the draw; in evaluation it is always the same.

    Args:
        seed: the module's own seed.
    """

    calls: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def uniform(self, tokens: Tokens) -> Tensor:
        """[B,N] float32 in (0,1)."""
        B, N = tokens.mask.shape
        if tokens.seeds is not None:
            return uniform(tokens.seeds, N, self.seed)
        seeds = torch.zeros_like(self.calls)
        if self.training:
            self.calls += 1
            seeds = self.calls
        return uniform(seeds.expand(B), N, self.seed)

    def gumbel(self, tokens: Tokens) -> Tensor:
        """Standard Gumbel noise, [B,N] float32."""
        return -torch.log(-torch.log(self.uniform(tokens)))

    def logistic(self, tokens: Tokens) -> Tensor:
        """Difference of two standard Gumbel variables, [B,N] float32."""
        return torch.logit(self.uniform(tokens))
