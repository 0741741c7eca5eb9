"""Counts the FLOPs of a training step on a real batch, frozen parts and attention included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


# torch counts the GPU's attention kernels, and nothing for the CPU's.
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """A context; ``get_total_flops()`` afterwards. One multiply-add is two FLOPs."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def can_count(module: nn.Module) -> bool:
    """Whether every part runs eagerly: compiled code is not seen by the counter."""
    return not any(part._compiled_call_impl is not None for part in module.modules())


def count_step(module: nn.Module, batch: Any) -> int:
    """FLOPs of ``module(batch)`` and its backward pass, in a pass of its own that leaves no trace.

    A step that is trained must not be counted: the counter takes other kernels, which round otherwise, and a
    resumed training would count another step than the straight one.

    Args:
        module: its ``forward`` takes a batch; gradients, buffers and random state are as before afterwards.
        batch: a batch on the module's device.

    Returns:
        FLOPs; one multiply-add is two.
    """
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng(), flop_counter() as counter:
        outputs = [t for t in _tensors(module(batch)) if t.requires_grad]
        if outputs:
            torch.autograd.grad([t.float().sum() for t in outputs], trainable, allow_unused=True)
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    return int(counter.get_total_flops())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
