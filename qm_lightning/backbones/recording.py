"""Sees the attention of Hugging Face models: one registered function, one record per forward call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qm_lightning.attention import attention_with_stats
from qm_lightning.backbones.policy_attention import policy_attention
from qm_lightning.errors import UserError
from qm_lightning.tokens import AttentionStats

IMPLEMENTATION = "qm_statistics"


@dataclass
class Steering:
    """What attention looks at when tokens are removed between layers, in place of the model's own mask.

    Attributes:
        mask: [B,N] bool, real tokens; ``None``: the model's own mask holds.
        bias: [B,1,1,N] float, added to the scores: log of the tokens' sizes, -inf for padding.
        policy: [B,N] float, 1 = kept, 0 = dropped but still there; ``None``: what is there is kept.
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    policy: Tensor | None = None


@dataclass
class Record:
    """What one forward call leaves behind.

    Attributes:
        layers: the attention modules to watch, with their layer's index.
        received: whether received attention is wanted.
        statistics: whether any are; keys are kept all the same.
        stats: statistics (L = 1) by layer.
        keys: [B,N,d_h], keys averaged over heads, by layer.
        steering: what attention looks at; changed between layers.
    """

    layers: Mapping[nn.Module, int]
    received: bool
    statistics: bool = True
    stats: dict[int, AttentionStats] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    steering: Steering = field(default_factory=Steering)


# A context variable and not a global: each thread and each nested call sees its own record, or none.
_record: ContextVar[Record | None] = ContextVar("record", default=None)


@contextmanager
def recording(layers: Mapping[nn.Module, int], received: bool, statistics: bool = True) -> Iterator[Record]:
    """Watch the attention modules ``layers`` for the length of one forward call."""
    record = Record(layers, received, statistics)
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: plain SDPA, and statistics where a record asks for them."""
    record = _record.get()
    layer = None if record is None else record.layers.get(module)
    steering = Steering() if record is None else record.steering
    if steering.bias is not None:
        attention_mask, is_causal = steering.bias.to(query.dtype), False
    if steering.policy is not None and steering.mask is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = policy_attention(query, key, value, steering.policy, steering.mask, scale)
        return attended.transpose(1, 2).contiguous(), None
    if record is not None and layer is not None:
        _refuse_unknown_scores(kwargs)
        _keep_keys(record, layer, key, module)
    if record is None or layer is None or not record.statistics:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
        return output
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal), False
    attended, record.stats[layer] = attention_with_stats(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        received=record.received,
    )
    return attended.transpose(1, 2).contiguous(), None


def _keep_keys(record: Record, layer: int, key: Tensor, module: nn.Module) -> None:
    if layer in record.keys:
        raise UserError(
            f"layer {layer} of this model attends more than once in a call ({type(module).__name__}), so its "
            "statistics are ambiguous; expected one attention per layer; choose a model whose layers "
            "share no weights and do not attend across two sequences"
        )
    record.keys[layer] = key.mean(dim=1)


def _refuse_unknown_scores(kwargs: Mapping[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"this model changes its attention scores ({name}), which no fused kernel does; expected "
                "plain scaled dot-product attention; choose another backbone"
            )


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
