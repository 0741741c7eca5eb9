"""Bits per byte against compression while text is merged as it is read, and what each merger costs.

Each streaming merger trains `configs/experiment/text_streaming.yaml` on the standard library's source with the same
prior, data order and steps. Beside them the same prior reads all tokens: with as many steps, and with as many
steps as cost the FLOPs of the first merger's training, counted with the frozen backbone's forward pass and, in a
further row, without it. A training step and generation are timed in processor seconds on one thread, which other
work on the machine disturbs little; the least of interleaved rounds counts. Finished cells are kept in --work, and
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._record import write_results
from qm_lightning.cli import main as command
from qm_lightning.generation import Generation, Sampling
from qm_lightning.modules import QuickMergeModule
from qm_lightning.runtime.find_checkpoint import resolve_checkpoint
from qm_lightning.runtime.flop_count import count_step, flop_counter
from qm_lightning.runtime.trained_run import TrainedRun, open_trained_run

EXPERIMENT = Path(__file__).parents[1] / "configs" / "experiment" / "text_streaming.yaml"
MERGERS = ["StreamingQuickMerge", "FixedStride", "EntropyThreshold", "LearnedRouter", "DynamicPooling"]
ALL, ALL_FLOPS, ALL_PRIOR = (f"all tokens, equal {what}" for what in ("steps", "FLOPs", "prior FLOPs"))
REFERENCES = [ALL, ALL_FLOPS, ALL_PRIOR]
WINDOW = 256
PROMPT, NEW_TOKENS = 192, 32


def main() -> None:
    """Train what is missing, measure, print the table, write `benchmarks/results/streaming.json`."""
    options = _options()
    torch.set_num_threads(1)
    runs: dict[str, list[TrainedRun]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for label in [options.mergers[0], *REFERENCES, *options.mergers[1:]]:
            directory = options.work / f"{label.replace(', ', '-').replace(' ', '_')}-{seed}"
            steps = steps_of(label, options.mergers[0], runs, options.steps)
            rows.setdefault(label, []).append(trained(label, directory, seed, steps, options))
            runs.setdefault(label, []).append(open_trained_run(directory, "last", options.backbone))
    first = {label: cells[0] for label, cells in runs.items() if label not in (ALL_FLOPS, ALL_PRIOR)}
    configuration = {
        "steps": options.steps,
        "seeds": options.seeds,
        "compression": options.compression,
        "work": f"{WINDOW}-byte passages of the standard library, batch 16, prior of text_streaming.yaml",
    }
    speed = speeds(first, options.rounds)
    path = write_results("streaming", configuration, quality=rows, speed=speed)
    _print(rows, speed, options.seeds)
    Console().print(f"written to {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks streaming", description=__doc__)
    parser.add_argument("--data", default="data/text_streaming", help="of prepare text --task passage")
    parser.add_argument(
        "--backbone", default="pretrained/text_streaming", help="of backbone_text_streaming.yaml"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/streaming"))
    parser.add_argument("--mergers", nargs="+", choices=MERGERS, default=MERGERS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--compression", type=float, default=2.37)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def steps_of(label: str, first: str, runs: dict[str, list[TrainedRun]], steps: int) -> int:
    """Steps of a training: those of all, or as many as cost the FLOPs of the ``first`` merger's."""
    if label not in (ALL_FLOPS, ALL_PRIOR):
        return steps
    merged, whole = (step_flops(runs[name][0], label == ALL_FLOPS) for name in (first, ALL))
    return max(1, round(steps * merged / whole))


def step_flops(run: TrainedRun, backbone: bool) -> int:
    """FLOPs of a training step on a batch of validation texts, with or without the frozen backbone's."""
    batch = next(iter(run.data.val_dataloader()))
    whole = count_step(trainable(run.module), batch)
    if backbone:
        return whole
    with flop_counter() as counter:  # as the merger asks for it: with attention statistics or without
        run.module.merger.read(run.module.backbone, batch["inputs"])
    return whole - int(counter.get_total_flops())


def trained(
    label: str, directory: Path, seed: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one cell, trained and tested unless it was already."""
    if not (directory / "results.json").is_file():
        arguments = [
            *("--config", str(EXPERIMENT), "--run_dir", str(directory), "--seed_everything", str(seed)),
            *("--data.root", options.data, "--model.backbone.name_or_path", options.backbone),
            *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)),
            *("--trainer.limit_val_batches", "2", "--trainer.enable_model_summary", "false"),
            *("--trainer.enable_progress_bar", "false", "--logger.wandb", "false"),
            *_merger(label, options.compression),
        ]
        begun = any((directory / "checkpoints").glob("*.ckpt"))
        start = ["--ckpt_path", "last"] if begun else ["--fresh", "true"]
        if not begun or resolve_checkpoint(directory, "last").step < steps:
            code = command(["fit", *arguments, *start, "--checkpoint_every", "100"])
            if code != 0 or resolve_checkpoint(directory, "last").step < steps:
                raise SystemExit(code or 1)
        if command(["test", *arguments, "--ckpt_path", "last"]) != 0:
            raise SystemExit(2)
    found = json.loads((directory / "results.json").read_text())
    return {
        "seed": seed,
        "steps": steps,
        "bits_per_byte": found["metrics"]["quality/bits"],
        "compression": found["metrics"]["tokens/compression"],
        "prior_flops_per_sample": found["cost"]["prior_flops_per_sample"],
    }


def _merger(label: str, compression: float) -> list[str]:
    if label not in MERGERS:
        return ["--model.merger", "NoMerge"]
    budget = "--model.merger.budget"
    return [
        *("--model.merger", label, budget, "qm_lightning.merging.FixedBudget"),
        *(f"{budget}.compression", str(compression)),
    ]


def speeds(runs: dict[str, TrainedRun], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step, and tokens per second of a continuation, per label."""
    best: dict[str, dict[str, float]] = {}
    texts = next(iter(next(iter(runs.values())).data.val_dataloader()))
    for _ in range(rounds):
        for label, run in runs.items():
            seen = {"step_ms": step_ms(run, texts), **writing(run, texts["inputs"]["input_ids"][0, :PROMPT])}
            held = best.setdefault(label, seen)
            for name, pick in (("step_ms", min), ("tokens_per_s", max)):
                held[name] = pick(held[name], seen[name])
    return best


def step_ms(run: TrainedRun, batch: dict[str, Any]) -> float:
    """One step of merger and prior, forward and backward, the backbone included."""
    module = trainable(run.module)
    start = time.process_time()
    _, merged, output = module(batch)
    loss = -output.log_likelihood(batch["targets"]).mean() + sum(merged.losses.values())
    loss.backward()
    seconds = time.process_time() - start
    module.zero_grad()
    return seconds * 1e3


def trainable(module: QuickMergeModule) -> QuickMergeModule:
    """The module as its training has it: merger and prior take gradients, the backbone does not."""
    module.merger.requires_grad_(True)
    module.prior.requires_grad_(True)
    return module


def writing(run: TrainedRun, prompt: torch.Tensor) -> dict[str, float]:
    """Speed and cache of a greedy continuation."""
    generation = Generation(run.module, [prompt], run.data.decode_targets, Sampling(NEW_TOKENS, 0.0))
    steps = iter(generation)
    next(steps)
    start = time.process_time()
    further = sum(1 for _ in steps)
    seconds = time.process_time() - start
    return {"tokens_per_s": further / seconds, "cache_bytes": generation.cost.cache_bytes}


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation where there is more than one."""
    text = f"{statistics.fmean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def _print(quality: dict[str, list[dict[str, Any]]], speeds: dict[str, dict[str, float]], seeds: int) -> None:
    table = Table(
        "method", "compression", "bits/byte", "steps", "prior MFLOP", "step ms", "tokens/s", "cache KiB"
    )
    table.title = f"Text merged while it is read; {seeds} seed(s), test passages"
    for label, cells in quality.items():
        speed = speeds.get(label, {})
        table.add_row(
            label,
            f"{statistics.fmean(c['compression'] for c in cells):.2f}",
            mean_and_spread([c["bits_per_byte"] for c in cells]),
            str(cells[0]["steps"]),
            f"{cells[0]['prior_flops_per_sample'] / 1e6:.0f}",
            *(f"{speed[n]:.0f}" if n in speed else "-" for n in ("step_ms", "tokens_per_s")),
            f"{speed['cache_bytes'] / 2**10:.0f}" if speed else "-",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
