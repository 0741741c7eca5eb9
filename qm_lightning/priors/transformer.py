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
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bias: Tensor,
        cache: KVCache | None,
        layer: int,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the tokens up to each one, or to those that ``mask`` allows.

        Args:
            x: [B,S,dim].
            tables: cosines and sines, [B,1,S,content / 2].
            bias: [B,S], see ``key_bias``.
            cache: earlier tokens; empty, or S = 1, or ``mask`` is given.
            layer: index of this layer in the cache.
            mask: bool, broadcastable to [B,heads,S,keys], True = may attend; ``None``: causal.

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
        if mask is None:
            out = self.attend(query, key, value)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        merged_heads: Tensor = self.project_out(out.transpose(1, 2).flatten(2))
        return merged_heads

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [B,heads,S,d]; scores are scaled and biased already. One query may follow many keys."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=1.0)


class WindowAttention(CausalAttention):
    """Each token attends to itself and the ``window - 1`` tokens before it, in O(S window).

    Args:
        dim: width.
        heads: number of heads.
        window: tokens seen.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads)
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A block of ``window`` queries sees its own keys and those of the block before it."""
        batch, heads, tokens, channels = query.shape
        width = self.window
        tail = -tokens % width
        query = F.pad(query, (0, 0, 0, tail))
        value = F.pad(value, (0, 0, width, tail))
        # The block before the first holds no tokens: zeros with the bias of padding.
        before = F.pad(key.new_zeros(batch, heads, width, channels - 1), (0, 1), value=PADDED)
        key = torch.cat([before, F.pad(key, (0, 0, 0, tail))], dim=2)

        def blocks(x: Tensor) -> Tensor:
            return x.reshape(batch, heads, -1, width, channels).transpose(1, 2)

        def pairs(x: Tensor) -> Tensor:
            return torch.cat([blocks(x)[:, :-1], blocks(x)[:, 1:]], dim=3).flatten(0, 1)

        place = torch.arange(width, device=query.device)
        distance = place[:, None] + width - torch.arange(2 * width, device=query.device)
        seen = (distance >= 0) & (distance < width)
        out = F.scaled_dot_product_attention(
            blocks(query).flatten(0, 1), pairs(key), pairs(value), attn_mask=seen, scale=1.0
        )
        return out.reshape(batch, -1, heads, width, channels).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


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
        attention: of this block.
        dim: width.
        depth: of the whole stack: the start of each branch is scaled so that the residual keeps its size.
        dropout: of each residual branch.
    """

    def __init__(self, attention: CausalAttention, dim: int, depth: int, dropout: float) -> None:
        super().__init__()
        # LayerNorm, not RMSNorm: on a CPU its backward is six times faster, and quality is the same.
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim, bias=False)
        self.mlp = SwiGLU(dim, hidden_width(dim))
        self.dropout = nn.Dropout(dropout)
        for branch in (self.attention.project_out, self.mlp.project_out):
            nn.init.normal_(branch.weight, std=(2 * depth * branch.in_features) ** -0.5)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bias: Tensor,
        cache: KVCache | None,
        layer: int,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B,S,dim] -> [B,S,dim]; arguments as in ``CausalAttention``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tables, bias, cache, layer, mask))
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
        window: tokens that each token sees, itself included; ``None``: all before it.

    Raises:
        UserError: the sizes do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(dim, depth, heads, dropout, window)
        self.dim, self.depth, self.heads = dim, depth, heads
        self.rope_base, self.window = rope_base, window

        def attention() -> CausalAttention:
            return CausalAttention(dim, heads) if window is None else WindowAttention(dim, heads, window)

        self.blocks = nn.ModuleList(Block(attention(), dim, depth, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.pairs = (dim // heads - BIAS_CHANNELS) // 2

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        bias: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Read a sequence from left to right, or as ``mask`` says.

        Args:
            x: [B,S,dim] embeddings.
            positions: [B,S,3] long.
            bias: [B,S] what each token adds to its scores as a key (``key_bias``); the first must be valid.
            cache: tokens read before; either empty, or S = 1, or ``mask`` is given. It is written to; the
                caller advances it.
            mask: bool, broadcastable to [B,heads,S,keys], True = may attend; ``None``: causal. Each row needs
                a key that it may attend to and that is valid.

        Returns:
            [B,S,dim] normalised hidden states; without a mask row s depends on tokens up to s only.
        """
        tables = rotary_tables(positions, self.pairs, self.rope_base, self.norm.weight.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, tables, bias, cache, layer, mask)
        out: Tensor = self.norm(x)
        return out

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens of ``batch`` samples, on the weights' device.

        Under autocast it has autocast's dtype, that of the keys.
        """
        weight = self.norm.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        empty = bias_channels(weight.new_full((1, 1), PADDED, dtype=torch.float32), dtype).flatten()
        return KVCache(self.depth, batch, self.heads, capacity, self.dim // self.heads, empty)

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that a cache of ``tokens`` tokens of ``batch`` samples takes, in the weights' type."""
        return 2 * self.depth * batch * tokens * self.dim * self.norm.weight.dtype.itemsize

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of one forward pass over ``tokens`` tokens of one sample.

        The attention's products are counted as full S x S ones, as ``torch.utils.flop_counter`` does; kernels
        that skip the upper triangle do nearly half of that part. A window counts two blocks for each block.
        """
        content = self.heads * (self.dim // self.heads - BIAS_CHANNELS)
        linear = self.dim * (2 * content + 2 * self.dim + 3 * hidden_width(self.dim))
        scores = tokens * tokens
        if self.window is not None:
            scores = 2 * self.window * (tokens + -tokens % self.window)
        return self.depth * 2 * (tokens * linear + 2 * scores * self.dim)


def _check_sizes(dim: int, depth: int, heads: int, dropout: float, window: int | None) -> None:
    if depth < 1 or heads < 1 or dim < 1:
        raise UserError(
            f"prior dim={dim}, depth={depth}, heads={heads}; expected all to be at least 1; raise them"
        )
    if dim % heads or dim // heads % 2 or dim // heads < 8:
        raise UserError(
            f"prior dim={dim} with heads={heads} gives {dim / heads:g} channels a head; expected an even "
            "number of at least 8; change dim or heads"
        )
    if window is not None and window < 1:
        raise UserError(f"prior window={window}; expected at least 1 token; raise it")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"prior dropout={dropout}; expected a share in [0, 1); mend it")
