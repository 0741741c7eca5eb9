"""Random numbers that depend on the sample alone: not on the process, the batch, the rank or a restart (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the constants of splitmix64 as signed integers
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(x: Tensor) -> Tensor:
    """Splitmix64's finaliser, int64 -> int64, in wrapping integer arithmetic that is equal on every device."""
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


def gumbel(seeds: Tensor, tokens: int, seed: int) -> Tensor:
    """Standard Gumbel noise [B,N] float32, made from :func:`uniform`."""
    return -torch.log(-torch.log(uniform(seeds, tokens, seed)))
