"""Exact statistics of attention without the N x N matrix (spec/quickmerge.md, section 1).

For row i with scores z_ij (scaled dot products, plus a bias if there is one), weights A_ij = softmax_j(z_ij):

    H_i = -sum_j A_ij log A_ij = lse_i - sum_j A_ij z_ij
    without a bias: sum_j A_ij z_ij = scale * q_i . (sum_j A_ij k_j)

so a fused kernel that also returns the log-sum-exp gives the entropy in one more pass, with the keys in the
place of the values. Where no such kernel fits (a bias, received attention, other devices) the scores are
walked through in blocks of queries: the same numbers, memory O(block * N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.tokens import AttentionStats

# A key whose additive mask lies below this is hidden, not just unlikely: half of what fp16 can hold at most.
_HIDDEN_BELOW = -32752.0
# Scores held at a time by the blockwise walk: few stay in a CPU's cache, an accelerator wants many.
_BLOCK_SCORES_CPU = 2**20
_BLOCK_SCORES_ACCELERATOR = 2**26


def attention_with_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    received: bool = False,
) -> tuple[Tensor, AttentionStats]:
    """Attend, and tell how the attention was spread.

    The output is ``scaled_dot_product_attention``'s own and carries gradients; the statistics do not. They
    are computed in fp32 (fp64 for fp64 input), whatever autocast says.

    Args:
        query: [B,heads,N,d] float.
        key: [B,kv_heads,N,d] float; ``heads`` is a multiple of ``kv_heads`` (grouped keys).
        value: [B,kv_heads,N,d_v] float.
        attn_mask: bool (True = visible) or additive float, broadcastable to [B,heads,N,N]. An additive
            value under -32752 hides the key; any other is a bias and part of the scores.
        is_causal: token i sees tokens 0..i; not together with ``attn_mask``.
        scale: factor of the dot products; ``None``: 1 / sqrt(d).
        received: also sum up what each token receives. Not causal.

    Returns:
        The output [B,heads,N,d_v] and the statistics with L = 1: entropy [1,B,N], norm [1,B,N] and received
        [1,B,N] or ``None``. A row without a visible key has entropy and norm 0. Received attention counts
        the queries that are tokens themselves: those that some query may look at.

    Source:
        spec/quickmerge.md, section 1 (ours).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    if attn_mask is not None:
        attn_mask = _four_dims(attn_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        stats = _statistics(query, key, output, attn_mask, is_causal, scale, received)
    return output, stats


def _statistics(
    query: Tensor,
    key: Tensor,
    output: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    received: bool,
) -> AttentionStats:
    precise = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(precise), key.to(precise)
    hidden = _hidden_keys(attn_mask)
    bias = _additive(attn_mask, hidden, precise)
    gains: Tensor | None = None
    if received or not _kernel_fits(query, attn_mask):
        tokens = _tokens(hidden, query, key)
        entropy, gains = _walk(query, key, bias, tokens if received else None, is_causal, scale)
    else:
        keys, lse = _attend_keys(query, key, bias, is_causal, scale)
        entropy = lse - scale * (query * keys).sum(-1)
    visible = _visible_counts(hidden, query, key, is_causal)
    # log(n) of one key would be a division by zero; such a row knows no choice, so its entropy is 0.
    spread = torch.where(visible > 1, entropy / visible.clamp(min=2).to(precise).log(), 0.0)
    norm = output.transpose(1, 2).flatten(2).to(precise).norm(dim=-1)
    norm = torch.where((visible > 0).any(dim=1), norm, 0.0)
    return AttentionStats(
        entropy=spread.clamp(0.0, 1.0).mean(dim=1).unsqueeze(0),
        norm=norm.unsqueeze(0),
        received=None if gains is None else gains.unsqueeze(0),
    )


def _four_dims(mask: Tensor) -> Tensor:
    """View as [B|1, heads|1, N|1, N|1]; a padding mask expanded over the queries shrinks back to one row."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask[:, :, :1] if mask.stride(2) == 0 else mask


def _hidden_keys(attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None:
        return None
    return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < _HIDDEN_BELOW


def _additive(attn_mask: Tensor | None, hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if attn_mask is None or hidden is None:
        return None
    if attn_mask.dtype == torch.bool:
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return attn_mask.to(dtype).masked_fill(hidden, float("-inf"))


def _visible_counts(hidden: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Visible keys per row, broadcastable to [B,heads,N]."""
    n = key.shape[2]
    if is_causal:
        return torch.arange(1, query.shape[2] + 1, device=key.device).clamp(max=n).view(1, 1, -1)
    if hidden is None:
        return torch.full((1, 1, 1), n, device=key.device)
    return n - hidden.expand(-1, -1, -1, n).sum(-1)


def _tokens(hidden: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Rows that are real tokens, broadcastable to [B,N]: a token that nobody may look at is padding."""
    if hidden is None or query.shape[2] != key.shape[2]:
        return torch.ones(1, 1, dtype=torch.bool, device=key.device)
    return ~hidden.all(dim=2).all(dim=1)


def _kernel_fits(query: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether a fused kernel gives the log-sum-exp, and the keys alone give the expected score."""
    if query.device.type == "cpu":
        return attn_mask is None or attn_mask.dtype == torch.bool
    return query.device.type == "cuda" and attn_mask is None


def _attend_keys(
    query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention-weighted mean of the keys [B,heads,N,d] and log-sum-exp of the scores [B,heads,N]."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        mean, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, key, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return mean, lse
    width = query.shape[-1]
    aligned = (0, -width % 8)  # the kernel wants a multiple of 8; zeros change no dot product
    query, key = F.pad(query, aligned), F.pad(key, aligned)
    mean, lse = aten._scaled_dot_product_efficient_attention(
        query, key, key, bias, True, 0.0, is_causal, scale=scale
    )[:2]
    return mean[..., :width], lse[..., : query.shape[2]]  # the kernel pads lse to a multiple of 32


def _walk(
    query: Tensor, key: Tensor, bias: Tensor | None, tokens: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Entropy [B,heads,N] and, given the real ``tokens``, received [B,N], block of queries by block."""
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    budget = _BLOCK_SCORES_CPU if query.device.type == "cpu" else _BLOCK_SCORES_ACCELERATOR
    size = max(1, min(rows, budget // max(1, batch * heads * columns)))
    entropy = query.new_zeros(batch, heads, rows)
    gains = None if tokens is None else query.new_zeros(batch, columns)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        last = min(stop, columns) if is_causal else columns
        scores = scale * query[:, :, start:stop] @ key[:, :, :last].transpose(-2, -1)
        if bias is not None:
            scores += bias if bias.shape[2] == 1 else bias[:, :, start:stop]
        if is_causal:
            scores.masked_fill_(_future(start, stop, last, scores.device), float("-inf"))
        weights = scores.softmax(dim=-1)  # a row without a visible key is nan; the caller overwrites it
        entropy[:, :, start:stop] = torch.special.entr(weights).sum(-1)
        if gains is not None and tokens is not None:
            counted = tokens if tokens.shape[1] == 1 else tokens[:, start:stop]
            given = weights.mean(dim=1).nan_to_num_(0.0) * counted.unsqueeze(-1)
            gains[:, :last] += given.sum(dim=1)
    return entropy, gains


def _future(start: int, stop: int, last: int, device: torch.device) -> Tensor:
    row = torch.arange(start, stop, device=device).unsqueeze(1)
    return torch.arange(last, device=device).unsqueeze(0) > row
