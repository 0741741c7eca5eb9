"""How fast a training is, where its time goes, and how well it uses the device."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from qm_lightning.callbacks.loop_state import logs_now, time_fetching
from qm_lightning.runtime.flop_count import can_count, count_step
from qm_lightning.runtime.peak_flops import peak_of


class Throughput(Callback):
    """Logs ``perf/...`` at the steps that are logged, averaged over the batches since the last such step.

    Counts stay on the device until then, and host clocks are read over many batches: no step waits for the
    device because of this. Validation is left out. Rates are rank 0's, times the number of ranks.
    FLOPs are counted once, on the first batch of the process, in a pass of its own; they are those of one rank.
    """

    def __init__(self) -> None:
        self._flops: float | None = None
        self._watching, self._warm = True, False
        self._handle: Any = None
        self._began = self._waited = 0.0
        self._fetch_began = self._pause_began = 0.0
        self._batches = 0
        self._samples: list[Tensor] = []
        self._tokens: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the merger and the loader, start the clock."""
        merger = getattr(pl_module, "merger", None)
        if isinstance(merger, torch.nn.Module) and self._handle is None:
            self._handle = merger.register_forward_hook(self._count_tokens)
        time_fetching(trainer, self._before_fetch, self._after_fetch)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._warm = False
        self._restart()

    def _before_fetch(self) -> None:
        self._fetch_began = time.perf_counter()

    def _after_fetch(self) -> None:
        self._waited += time.perf_counter() - self._fetch_began

    def _count_tokens(self, merger: torch.nn.Module, inputs: tuple[Any, ...], merged: Any) -> None:
        if (
            self._watching
            and merger.training
            and inputs
            and hasattr(merged, "mask")
            and hasattr(inputs[0], "mask")
        ):
            self._tokens.append((inputs[0].mask.sum(), merged.mask.sum()))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count FLOPs, once."""
        if self._flops is not None:
            return
        self._flops, self._watching = 0.0, False
        countable = is_overridden("forward", pl_module) and can_count(pl_module)
        if countable and not isinstance(trainer.strategy, ModelParallelStrategy):
            try:
                with trainer.precision_plugin.forward_context():
                    self._flops = float(count_step(pl_module, batch))
            except (TypeError, KeyError) as error:  # a forward that takes something else than a batch
                rank_zero_info(f"no perf/mfu: {type(pl_module).__name__} cannot be counted ({error})")
        self._watching = True
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what has gathered; the first batch is left out, since its data came before the clock ran."""
        if not self._warm:
            self._warm = True
            self._restart()
            return
        self._batches += 1
        if isinstance(batch, dict) and isinstance(batch.get("valid"), Tensor):
            self._samples.append(batch["valid"].sum())
        if logs_now(trainer):
            figures = self._figures(trainer)
            pl_module.log_dict(figures, rank_zero_only=True, batch_size=1)
            self._restart()

    def _figures(self, trainer: Trainer) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        step = seconds / self._batches
        ranks = trainer.world_size
        figures = {
            "perf/step_s": step,
            "perf/data_wait_share": min(1.0, self._waited / seconds),
            "perf/peak_memory_gib": _peak_memory(trainer.strategy.root_device) / 2**30,
        }
        if self._samples:
            figures["perf/samples_per_s"] = float(torch.stack(self._samples).sum()) / seconds * ranks
        if self._tokens:
            before, after = (torch.stack(counts).sum() for counts in zip(*self._tokens, strict=True))
            figures["perf/tokens_per_s_before"] = float(before) / seconds * ranks
            figures["perf/tokens_per_s_after"] = float(after) / seconds * ranks
        if self._flops:
            figures["perf/gflops_per_step"] = self._flops / 1e9
            figures["perf/tflops_per_s"] = self._flops / step / 1e12
            peak = peak_of(trainer.strategy.root_device, str(trainer.precision))
            if peak is not None:
                figures["perf/mfu"] = self._flops / step / peak
        return figures

    def _restart(self) -> None:
        self._began, self._waited, self._batches = time.perf_counter(), 0.0, 0
        self._samples, self._tokens = [], []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        self._began += time.perf_counter() - self._pause_began

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _peak_memory(device: torch.device) -> int:
    """Bytes: what the allocator of the device has held at most, or the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
