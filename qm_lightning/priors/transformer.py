"""The causal transformer under every prior: pre-norm, RoPE, SwiGLU, proportional attention.

Proportional attention adds ``log size`` of each key to its scores, so that a token that stands for five
tokens weighs as five. Fused kernels take no additive bias beside ``is_causal``, so two channels of each head
carry it: the query holds (1, 1), the key holds ``log size`` split into the part that the kernel's dtype can
express and the rest, and a padded key holds a number so negative that its weight is exactly zero
(reduction.md, section 1; the split for bf16 is ours).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.rope import rotary_tables, rotate

BIAS_CHANNELS = 2
# exp(PADDED) is zero in every dtype, and fp16 can hold it.
PADDED = -1e4


def key_bias(size: Tensor, mask: Tensor) -> Tensor:
    """What each key adds to its scores: ``log size``, or ``PADDED``.

    Args:
        size: [B,S] float > 0 where ``mask`` is True.
        mask: [B,S] bool, True = real token.

    Returns:
        [B,S] in the dtype of ``size``.
    """
    return size.masked_fill(~mask, 1.0).log().masked_fill(~mask, PADDED)


def bias_channels(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Split a bias so that two channels of a narrow dtype hold it.

    Args:
        bias: [B,S] float.
        dtype: of the keys.

    Returns:
        [B,1,S,2] in ``dtype``; the two sum to ``bias``.
    """
    high = bias.to(dtype)
    return torch.stack([high, (bias - high).to(dtype)], dim=-1).unsqueeze(1)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with a bias per key, in one fused kernel.

    Args:
        dim: width.
        heads: number of heads; of ``dim / heads`` channels; in queries and keys two of them carry the bias.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.content = self.head_dim - BIAS_CHANNELS
        widths = (heads * self.content, heads * self.content, dim)
        self.split = widths
        self.project_in = nn.Linear(dim, sum(widths), bias=False)
        self.project_out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], bias: Tensor, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Attend to the tokens up to each one.

        Args:
            x: [B,S,dim].
            tables: cosines and sines, [B,1,S,content / 2].
            bias: [B,S], see ``key_bias``.
            cache: earlier tokens; empty, or S = 1.
            layer: index of this layer in the cache.

        Returns:
            [B,S,dim].
        """
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.project_in(x).split(self.split, dim=-1)
        )
        ones = value.new_ones(BIAS_CHANNELS)
        query = rotate(query * self.content**-0.5, *tables, ones)
        key = rotate(key, *tables, bias_channels(bias, value.dtype))
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=x.shape[1] > 1, scale=1.0)
        merged_heads: Tensor = self.project_out(out.transpose(1, 2).flatten(2))
        return merged_heads


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_up x)``.

    Args:
        dim: width.
        hidden: inner width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[...,dim] -> [...,dim]."""
        gate, up = self.project_in(x).chunk(2, dim=-1)
        out: Tensor = self.project_out(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Attention and SwiGLU, each behind a LayerNorm and a residual.

    Args:
        dim: width.
        heads: attention heads.
        depth: of the whole stack: the start of each branch is scaled so that the residual keeps its size.
        dropout: of each residual branch.
    """

    def __init__(self, dim: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        # LayerNorm, not RMSNorm: on a CPU its backward is six times faster, and quality is the same.
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.attention = CausalAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, bias=False)
        self.mlp = SwiGLU(dim, hidden_width(dim))
        self.dropout = nn.Dropout(dropout)
        for branch in (self.attention.project_out, self.mlp.project_out):
            nn.init.normal_(branch.weight, std=(2 * depth * branch.in_features) ** -0.5)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], bias: Tensor, cache: KVCache | None, layer: int
    ) -> Tensor:
        """[B,S,dim] -> [B,S,dim]; arguments as in ``CausalAttention``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tables, bias, cache, layer))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


def hidden_width(dim: int) -> int:
    """Inner width of the SwiGLU: 8/3 of ``dim``, rounded to a multiple of 16."""
    return 16 * max(1, round(dim * 8 / 3 / 16))


class CausalTransformer(nn.Module):
    """A stack of blocks and a last norm.

    Args:
        dim: width.
        depth: blocks.
        heads: attention heads.
        dropout: of residual branches.
        rope_base: longest wavelength over 2 pi, in positions.

    Raises:
        UserError: the sizes do not fit each other.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, dropout: float = 0.0, rope_base: float = 10_000.0
    ) -> None:
        super().__init__()
        _check_sizes(dim, depth, heads, dropout)
        self.dim, self.depth, self.heads = dim, depth, heads
        self.rope_base = rope_base
        self.blocks = nn.ModuleList(Block(dim, heads, depth, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.pairs = (dim // heads - BIAS_CHANNELS) // 2

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor, cache: KVCache | None = None) -> Tensor:
        """Read a sequence from left to right.

        Args:
            x: [B,S,dim] embeddings.
            positions: [B,S,3] long.
            bias: [B,S] what each token adds to its scores as a key (``key_bias``); the first must be valid.
            cache: tokens read before; either empty, or S = 1. It is extended.

        Returns:
            [B,S,dim] normalised hidden states; row s depends on tokens up to s only.
        """
        tables = rotary_tables(positions, self.pairs, self.rope_base, self.norm.weight.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, tables, bias, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        out: Tensor = self.norm(x)
        return out

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens of ``batch`` samples, on the weights' device.

        Under autocast it has autocast's dtype, that of the keys.
        """
        weight = self.norm.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(self.depth, batch, self.heads, capacity, self.dim // self.heads, weight.device, dtype)

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of one forward pass over ``tokens`` tokens of one sample.

        The attention's products are counted as full S x S ones, as ``torch.utils.flop_counter`` does; kernels
        that skip the upper triangle do nearly half of that part.
        """
        content = self.heads * (self.dim // self.heads - BIAS_CHANNELS)
        linear = self.dim * (2 * content + 2 * self.dim + 3 * hidden_width(self.dim))
        attention = 2 * tokens * self.dim
        return self.depth * 2 * tokens * (linear + attention)


def _check_sizes(dim: int, depth: int, heads: int, dropout: float) -> None:
    if depth < 1 or heads < 1 or dim < 1:
        raise UserError(
            f"prior dim={dim}, depth={depth}, heads={heads}; expected all to be at least 1; raise them"
        )
    if dim % heads or dim // heads % 2 or dim // heads < 8:
        raise UserError(
            f"prior dim={dim} with heads={heads} gives {dim / heads:g} channels a head; expected an even "
            "number of at least 8; change dim or heads"
        )
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"prior dropout={dropout}; expected a share in [0, 1); mend it")
