"""What a trained module costs: time per part, FLOPs of the prior, memory of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qm_lightning.modules.multimodal import ModalityView
from qm_lightning.modules.quickmerge import QuickMergeModule


def _median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
    module: QuickMergeModule | ModalityView, batch: dict[str, Any], repeats: int = 7
) -> dict[str, float]:
    """Measure one batch in evaluation mode, one part after the other.

    Args:
        module: the trained module, or one modality of it, on its device.
        batch: a full batch on the same device.
        repeats: timed calls per part; the median counts.

    Returns:
        ``ms_backbone`` (with the merging, where that happens inside), ``ms_merge``, ``ms_prior`` and their sum
        ``ms_per_sample`` (milliseconds per sample), ``prior_flops_per_sample``, and ``peak_memory_bytes``:
        activations that a training step of merger and prior keeps for its backward pass, for the batch.
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
    cost = {
        f"ms_{name}": _median_seconds(call, device, repeats) * 1e3 / samples for name, call in parts.items()
    }
    cost["ms_per_sample"] = sum(cost.values())
    kept = float(merged.mask.sum(1).float().mean())
    cost["prior_flops_per_sample"] = float(module.prior.flops(round(kept), int(batch["targets"].shape[1])))
    cost["peak_memory_bytes"] = float(
        activation_bytes(
            lambda: module.prior(merged if inside else merger(tokens), batch["targets"]).logits.sum()
        )
    )
    module.train(was_training)
    return cost
