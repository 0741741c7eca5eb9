"""What a trained module costs: time per part, FLOPs of the prior, memory of a training step."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qm_lightning.merging.budget import Budget
from qm_lightning.modules.multimodal import ModalityView
from qm_lightning.modules.quickmerge import QuickMergeModule

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEEP_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**25  # the most that mallopt takes


def _keep_freed_memory() -> None:
    """Let this process keep what tensors free, on Linux, until it ends.

    Else each call asks the system for its pages anew, or not, as the heap happens to lie: between two processes that
    alone was up to a factor of 1.7 for the same backbone.
    """
    with suppress(AttributeError, OSError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def _fastest_seconds(
    parts: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """The fastest of ``rounds`` calls of each part: whatever else the machine does only ever adds to a call.

    Parts take turns, so that a slow spell of the machine does not fall on one of them alone.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    fastest = dict.fromkeys(parts, float("inf"))
    for turn in range(rounds + 1):
        for name, call in parts.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn > 0:  # the first call allocates and, compiled, compiles
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


def activation_bytes(call: Callable[[], Tensor]) -> int:
    """Memory that autograd keeps for the backward pass of one call, in bytes (each storage counted once).

    A device's own peak counter also sees temporary buffers; this one needs no device and repeats exactly.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


@torch.no_grad()
def measure_cost(
    module: QuickMergeModule | ModalityView, batch: dict[str, Any], rounds: int = 20
) -> dict[str, float]:
    """Measure one batch.

    Args:
        module: the trained module, or one modality of it, on its device.
        batch: a full batch on the same device.
        rounds: timed calls per part; the fastest counts.

    Returns:
        ``ms_backbone`` (with the merging, where that happens inside), ``ms_merge``, ``ms_prior`` and their sum
        ``ms_per_sample`` (milliseconds per sample), ``prior_flops_per_sample``, all in evaluation; and
        ``peak_memory_bytes``: activations that a training step of merger and prior keeps for its backward pass, for
        the batch (a merger between the backbone's layers: of the prior).
    """
    was_training = module.training
    module.eval()
    samples = int(batch["valid"].shape[0])
    device = batch["targets"].device
    tokens, merged = module.merge(batch)
    merger: Any = module.merger
    inside = getattr(merger, "inside", False)
    parts: dict[str, Callable[[], object]] = {
        "backbone": lambda: (
            merger.encode(module.backbone, batch["inputs"])
            if inside
            else merger.read(module.backbone, batch["inputs"])
        ),
        "merge": lambda: None if inside else merger(tokens),
        "prior": lambda: module.prior(merged, batch["targets"]),
    }
    _keep_freed_memory()
    seconds = _fastest_seconds(parts, device, rounds)
    cost = {f"ms_{name}": took * 1e3 / samples for name, took in seconds.items()}
    cost["ms_per_sample"] = sum(cost.values())
    kept = float(merged.mask.sum(1).float().mean())
    cost["prior_flops_per_sample"] = float(module.prior.flops(round(kept), int(batch["targets"].shape[1])))
    _train_without_control(module)
    cost["peak_memory_bytes"] = float(
        activation_bytes(
            lambda: module.prior(merged if inside else merger(tokens), batch["targets"]).logits.sum()
        )
    )
    module.train(was_training)
    return cost


def _train_without_control(module: nn.Module) -> None:
    """Training mode, in which some mergers keep more tokens, but budgets rest: a controller would take a step."""
    module.train()
    for part in module.modules():
        if isinstance(part, Budget):
            part.eval()
