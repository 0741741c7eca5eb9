"""Attention in which some tokens are dropped softly, so that dropping them has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def policy_attention(
    query: Tensor, key: Tensor, value: Tensor, policy: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attend to the tokens that the policy keeps, and to oneself.

    ``(exp(P_ij - max_j P_ij) G_ij + eps/n) / (sum_j exp(P_ij - max_j P_ij) G_ij + eps)`` with G_ij the policy
    of token j, 1 where i = j: a dropped token still sees itself and the kept ones, nobody else sees it. With
    a policy of ones it is the softmax, up to eps.

    Args:
        query: [B,heads,N,d] float.
        key: [B,heads,N,d] float.
        value: [B,heads,N,d_v] float.
        policy: [B,N] float, 1 = kept, 0 = dropped.
        mask: [B,N] bool, real tokens.
        scale: factor of the dot products.

    Returns:
        [B,heads,N,d_v], computed in fp32 or better.

    Source:
        spec/reduction.md, section 4 (DynamicViT).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = scale * query.to(dtype) @ key.to(dtype).transpose(-2, -1)
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        own = torch.eye(policy.shape[1], dtype=dtype, device=policy.device)
        open_ = policy.to(dtype)[:, None, None, :] * (1.0 - own) + own
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * open_
        real = mask[:, None, None, :].to(dtype)
        even = real / real.sum(-1, keepdim=True).clamp(min=1.0)
        weights = (weights + EPSILON * even) / (weights.sum(-1, keepdim=True) + EPSILON)
        return (weights @ value.to(dtype)).to(value.dtype)
