"""What looking after a training costs: callbacks and logs per step, saving, a pre-emption, a restart.

Claims: callbacks and logs cost at most 3 % of a step of the demo against Lightning's `barebones`; a checkpoint of the
demo's prior behind a frozen backbone of 100 M parameters takes at most 1/50 of the time and bytes of saving all.
An exact resume needs the trained weights and the optimizer's moments (Adam's two, Muon's one), which nothing else
determines; what these alone allow is reported beside the bytes found. Merger, prior and optimizer are those of
`configs/model/quickmerge_image.yaml`.
A step is counted in CPU seconds of the training process, which other work on the machine does not stretch, and in
wall seconds beside it; rivals take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from transformers import ViTConfig, ViTModel

from datamodules import ImageDataModule
from datamodules.shards.writer import write_shards
from datamodules.sources.image import DigitScenes
from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.merging import EntropyBudget, QuickMerge
from qm_lightning.modules import QuickMergeModule
from qm_lightning.modules.optim import OptimizerOptions, build_optimizer
from qm_lightning.priors import ARPrior
from qm_lightning.runtime.assemble import always_on_callbacks, trainer_arguments
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO
from qm_lightning.runtime.loggers import TrackingOptions, make_loggers
from qm_lightning.runtime.run_directory import open_run_directory

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "tracking.json"
BATCH = 32  # of the demo
WARM_UP = 5  # steps of each fit that are not counted; the first one holds the pass that counts FLOPs


def main() -> None:
    """Measure, print a table, write ``benchmarks/results/tracking.json``."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=30, help="counted steps of each fit")
    options.add_argument("--rounds", type=int, default=3, help="turns of each rival")
    options.add_argument("--out", type=Path, default=RESULTS, help="file that the figures are added to")
    options.add_argument("--ranks", type=int, default=2, help="ranks of the pre-empted job")
    options.add_argument(
        "--parts", nargs="+", default=["checkpoint", "preemption", "step"], help="what to measure"
    )
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        # Parts that were measured before, each with its own configuration, are kept.
        results: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "checkpoint": lambda: checkpoint_cost(folder, chosen.rounds),
            "preemption": lambda: preemption(folder, chosen.ranks),
            "step": lambda: step_overhead(folder, chosen.steps, chosen.rounds),
        }
        for part in chosen.parts:
            results[part] = {"configuration": configuration(chosen), **parts[part]()}
            chosen.out.write_text(json.dumps(results, indent=2) + "\n")
    _print(results, chosen.out)


def configuration(chosen: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": 1, "load_average": os.getloadavg(), "batch": BATCH,
        "experiment": "configs/experiment/image.yaml, backbone not trained",
        "steps": chosen.steps, "rounds": chosen.rounds, "ranks": chosen.ranks,
    }  # fmt: skip


def prepare(folder: Path) -> None:
    """Digit scenes as shards, and a backbone of the demo's size."""
    sizes: dict[Literal["train", "val", "test"], int] = {"train": 640, "val": 64}
    for split, count in sizes.items():
        write_shards(folder / "data", split, DigitScenes(split, count, 0), shard_size=200, progress=False)
    model = small_vit()
    save_backbone(model, folder / "backbone", preprocessing_of(model))


def demo_module(backbone: Path, layers: int = 3) -> QuickMergeModule:
    """The module of the image experiment, as its file describes it."""
    recipe = yaml.safe_load((ROOT / "configs/model/quickmerge_image.yaml").read_text())["init_args"]
    merger = dict(recipe["merger"]["init_args"])
    budget = EntropyBudget(**merger.pop("budget")["init_args"])
    return QuickMergeModule(
        HFBackbone(str(backbone), layers=layers),
        QuickMerge(budget=budget, **merger),
        lambda width, vocabulary: ARPrior(width, vocabulary, **recipe["prior"]["init_args"]),
        vocab_size=11,
        eos_id=10,
        optimizer=OptimizerOptions(**recipe["optimizer"]),
    )


class StepClock(pl.Callback):
    """CPU and wall seconds between the ends of two steps."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A first start."""
        if not self.ends:
            self.ends.append((time.process_time(), time.perf_counter()))

    def on_train_batch_end(self, *_: Any) -> None:
        """One more step."""
        self.ends.append((time.process_time(), time.perf_counter()))

    def medians(self) -> tuple[float, float]:
        """CPU and wall seconds of a step."""
        counted = self.ends[WARM_UP:]
        spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counted)]
        cpu, wall = zip(*spans, strict=True)
        return statistics.median(cpu), statistics.median(wall)


def fit(folder: Path, name: str, steps: int) -> tuple[float, float]:
    """Train for some steps: ``barebones`` or with everything that is always on; seconds of a step."""
    module, clock = demo_module(folder / "backbone"), StepClock()
    data = ImageDataModule(folder / "data", BATCH, processor=str(folder / "backbone"))
    if name == "barebones":
        trainer = pl.Trainer(
            barebones=True, accelerator="cpu", max_steps=steps, callbacks=[clock, *data.callbacks()],
            use_distributed_sampler=False,
        )  # fmt: skip
    else:
        run = open_run_directory(str(folder / "runs" / f"{name}-{time.time_ns()}"), "bench")
        trainer = pl.Trainer(
            default_root_dir=str(run.path), accelerator="cpu", max_steps=steps, log_every_n_steps=10,
            num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False,
            logger=make_loggers(run, "bench", TrackingOptions(mode="offline"), {}),
            callbacks=[clock, *always_on_callbacks(run, 0, 10 * steps), *data.callbacks()],
            **trainer_arguments({"accelerator": "cpu"}),
        )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return clock.medians()


def step_overhead(folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """A step with everything against a bare one, in turns."""
    taken: dict[str, list[tuple[float, float]]] = {"barebones": [], "everything": []}
    for _ in range(rounds):
        for name, seconds in taken.items():
            seconds.append(fit(folder, name, steps + WARM_UP))
    ratios = [
        [
            full[clock] / bare[clock]
            for full, bare in zip(taken["everything"], taken["barebones"], strict=True)
        ]
        for clock in (0, 1)
    ]
    return {
        "cpu_seconds": {name: [cpu for cpu, _ in seconds] for name, seconds in taken.items()},
        "wall_seconds": {name: [wall for _, wall in seconds] for name, seconds in taken.items()},
        "cpu_ratio": statistics.median(ratios[0]),
        "cpu_ratio_each": ratios[0],
        "wall_ratio": statistics.median(ratios[1]),
        "wall_ratio_each": ratios[1],
    }


def checkpoint_cost(folder: Path, rounds: int) -> dict[str, Any]:
    """Our checkpoint behind 100 M frozen parameters, against Lightning's of everything."""
    model = ViTModel(ViTConfig(num_hidden_layers=14, image_size=64, patch_size=8, num_channels=1))
    save_backbone(model, folder / "large", preprocessing_of(model))
    module = demo_module(folder / "large")
    optimizer = build_optimizer(module.named_parameters(), module.options, max_steps=100)["optimizer"]
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def content() -> dict[str, Any]:
        return {
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "global_step": 1,
        }

    def save_ours() -> None:
        checkpoint = content()
        module.on_save_checkpoint(checkpoint)
        AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "ours.ckpt")

    def save_all() -> None:
        TorchCheckpointIO().save_checkpoint(content(), folder / "all.ckpt")

    save_ours()  # the backbone's fingerprint is computed once and kept
    seconds: dict[str, list[float]] = {"ours": [], "all": []}
    for _ in range(rounds):
        for name, save in (("ours", save_ours), ("all", save_all)):
            began = time.perf_counter()
            save()
            seconds[name].append(time.perf_counter() - began)
    sizes = {name: (folder / f"{name}.ckpt").stat().st_size for name in seconds}
    frozen = sum(p.numel() for p in module.backbone.parameters())
    # Steps counted by Adam are scalars, one a parameter.
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    kept = moments + sum(p.nbytes for p in trained)
    return {
        "frozen_parameters": frozen, "trained_parameters": sum(p.numel() for p in trained),
        "seconds": seconds, "bytes": sizes,
        "seconds_ratio": statistics.median(a / b for a, b in zip(seconds["all"], seconds["ours"], strict=True)),
        "bytes_ratio": sizes["all"] / sizes["ours"],
        "bytes_ratio_of_weights_and_moments_alone": (4 * frozen + kept) / kept,
    }  # fmt: skip


def preemption(folder: Path, ranks: int) -> dict[str, float]:
    """Seconds of a real job: launch to first step, SIGTERM on one rank to all gone, restart to the next step."""
    run = folder / "preempted"
    job, first = _launch(folder, run, ranks, after=0)
    worker = int(subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split()[-1])
    began = time.perf_counter()
    os.kill(worker, signal.SIGTERM)
    job.wait(timeout=120)
    gone = time.perf_counter() - began
    saved = max(int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.ckpt"))
    again, restart = _launch(folder, run, ranks, after=saved)
    again.terminate()
    again.wait(timeout=120)
    return {"launch_to_first_step_s": first, "sigterm_to_gone_s": gone, "restart_to_next_step_s": restart}


def _launch(folder: Path, run: Path, ranks: int, after: int) -> tuple[subprocess.Popen[bytes], float]:
    """Start the job and wait for the first checkpoint beyond a step; checkpoints are written at every step."""
    began = time.perf_counter()
    job = subprocess.Popen(
        [
            str(ROOT / "configs/launch/torchrun.sh"), "fit", "--config", "configs/experiment/image.yaml",
            "--data.root", str(folder / "data"), "--model.backbone.name_or_path", str(folder / "backbone"),
            "--run_dir", str(run), "--checkpoint_every", "1", "--trainer.max_steps", "100000",
            "--trainer.enable_progress_bar", "false", "--logger.wandb", "false",
            *(["--ckpt_path", "last"] if after else []),
        ],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"GPUS": str(ranks), "RESTARTS": "0", "OMP_NUM_THREADS": "1",
                          "TORCHRUN": str(Path(sys.executable).with_name("torchrun"))},
    )  # fmt: skip
    while job.poll() is None:
        steps = [int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.ckpt")]
        if max(steps, default=0) > after:
            return job, time.perf_counter() - began
        time.sleep(0.02)
    raise RuntimeError(f"the job ended with {job.returncode} before its first step; expected it to train")


def _print(results: dict[str, Any], out: Path) -> None:
    table = Table("what", "found", "claim")
    if step := results.get("step"):
        table.add_row("step with everything / barebones, CPU", f"{step['cpu_ratio']:.3f}", "<= 1.03")
        table.add_row("step with everything / barebones, wall", f"{step['wall_ratio']:.3f}", "")
    if checkpoint := results.get("checkpoint"):
        table.add_row("saving all / ours, seconds", f"{checkpoint['seconds_ratio']:.0f}", ">= 50")
        table.add_row("saving all / ours, bytes", f"{checkpoint['bytes_ratio']:.1f}", ">= 50")
        best = checkpoint.get("bytes_ratio_of_weights_and_moments_alone")
        table.add_row("the same, weights and moments alone", f"{best:.1f}" if best else "-", "")
    for name, seconds in results.get("preemption", {}).items():
        if name != "configuration":
            table.add_row(name, f"{seconds:.1f} s", "")
    Console().print(table, f"written to {out}")


if __name__ == "__main__":
    main()
