"""A training step through Lightning against the same step in a bare PyTorch loop, interleaved in one process.

Claim: at most 1.05x. The step is that of the image demo: frozen ViT, QuickMerge, prior, losses, AdamW, clipping. Both
sides read the same batches from memory, and the Lightning side keeps a progress bar and a logger out, which
``python -m benchmarks tracking`` measures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from benchmarks._record import write_results
from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.merging import EntropyBudget, QuickMerge
from qm_lightning.modules import QuickMergeModule
from qm_lightning.modules.optim import build_optimizer
from qm_lightning.priors import ARPrior

BATCH, CLIP = 64, 1.0


def main() -> None:
    """Measure, print the ratio of each round, write ``benchmarks/results/training_step.json``."""
    parser = argparse.ArgumentParser("python -m benchmarks training_step")
    parser.add_argument("--steps", type=int, default=40, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vit = small_vit()
        save_backbone(vit, folder, preprocessing_of(vit))
        batches = [make_batch(i) for i in range(8)]
        bare_seconds, lightning_seconds = [], []
        bare(make_module(folder, 3), batches, 3)  # warm up
        for _ in range(options.rounds):
            bare_seconds.append(bare(make_module(folder, options.steps), batches, options.steps))
            lightning_seconds.append(
                through_lightning(make_module(folder, options.steps), batches, options.steps)
            )
    ratios = [a / b for a, b in zip(lightning_seconds, bare_seconds, strict=True)]
    console = Console()
    console.print(
        f"Lightning / bare loop, median of {options.rounds} rounds: {statistics.median(ratios):.3f}"
    )
    console.print("rounds: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    configuration = {"batch": BATCH, "steps": options.steps, "rounds": options.rounds}
    path = write_results("training_step", configuration, bare=bare_seconds, lightning=lightning_seconds)
    console.print(f"written to {path}")


def make_module(folder: str, steps: int) -> QuickMergeModule:
    """The image demo's module."""
    torch.manual_seed(0)
    prior = ARPrior(96, 11, dim=96, depth=2, heads=4)
    module = QuickMergeModule(HFBackbone(folder, layers=3), QuickMerge(EntropyBudget()), prior, eos_id=10)
    module.options.decay_steps = steps
    return module


def make_batch(seed: int) -> dict[str, Any]:
    """A batch of the image data's shapes."""
    random = torch.Generator().manual_seed(seed)
    return {
        "inputs": {"pixel_values": torch.randn(BATCH, 1, 64, 64, generator=random)},
        "targets": torch.randint(0, 11, (BATCH, 4), generator=random),
        "valid": torch.ones(BATCH, dtype=torch.bool),
        "seeds": torch.arange(BATCH) + BATCH * seed,
    }


def bare(module: QuickMergeModule, batches: list[dict[str, Any]], steps: int) -> float:
    """Seconds of a step in a loop that does no more than it must."""
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    recipe: Any = build_optimizer(module.named_parameters(), module.options, steps)
    optimizer, schedule = recipe["optimizer"], recipe["lr_scheduler"]["scheduler"]
    module.train()
    start = time.perf_counter()
    for step in range(steps):
        loss = module.training_step(batches[step % len(batches)], step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - start) / steps


def through_lightning(module: QuickMergeModule, batches: list[dict[str, Any]], steps: int) -> float:
    """Seconds of a step in ``Trainer.fit``, from the first batch's start to the last one's end."""
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        stamps.append(time.perf_counter())

    def first(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            stamp()

    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_start=first, on_train_batch_end=stamp)],
    )
    repeated: DataLoader[Any] = DataLoader(
        cast("Dataset[Any]", [batches[i % len(batches)] for i in range(steps)]), batch_size=None
    )
    trainer.fit(module, repeated)
    return (stamps[-1] - stamps[0]) / steps


if __name__ == "__main__":
    main()
