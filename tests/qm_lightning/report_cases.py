"""Runs as the test verb leaves them, made in a moment: realistic figures, no training."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

TOKENS = 64

# Nats per target token at 64, 42.7, 27, 16 and 8 tokens, close to a quick trial of the demo.
LOSSES: dict[str, dict[float, float]] = {
    "QuickMerge": {1.5: 0.121, 2.37: 0.125, 4.0: 0.113, 8.0: 0.238},
    "ToMe": {1.5: 0.148, 2.37: 0.150, 4.0: 0.354, 8.0: 0.375},
    "UniformPool": {1.5: 0.163, 2.37: 0.157, 4.0: 0.144, 8.0: 0.232},
    "RandomPrune": {1.5: 0.41, 2.37: 0.575, 4.0: 0.81, 8.0: 1.12},
    "TopKPrune": {1.5: 0.133, 2.37: 0.139, 4.0: 0.171, 8.0: 0.342},
}
FULL_LOSS = 0.158


def results(merger: str, compression: float | None, seed: int, loss: float) -> dict[str, Any]:
    """The content of results.json; the noise over seeds is a pure function of the arguments."""
    chance = random.Random(f"{merger}/{compression}/{seed}")
    nats = loss * (1 + chance.gauss(0, 0.03))
    entropy = merger == "QuickMerge"
    kept = TOKENS / (compression or 1.0)
    arguments: dict[str, Any] = {}
    if compression is not None:
        name = "EntropyBudget" if entropy else "FixedBudget"
        arguments["budget"] = {
            "class_path": f"qm_lightning.merging.{name}",
            "init_args": {"compression": compression},
        }
    return {
        "experiment": "image",
        "modality": "image",
        "merger": merger,
        "merger_args": arguments,
        "budget": arguments["budget"]["class_path"].rsplit(".", 1)[-1] if arguments else None,
        "compression_target": compression,
        "seed": seed,
        "steps": 600,
        "split": "test",
        "samples": 1000,
        "metrics": {
            "quality/nats": nats,
            "quality/bits": nats / math.log(2),
            "quality/perplexity": math.exp(nats),
            "quality/exact": math.exp(-2.2 * nats),
            "quality/top1": math.exp(-0.7 * nats),
            "tokens/compression": TOKENS / kept,
            "tokens/kept_mean": kept * (1 + chance.gauss(0, 0.01) * entropy),
            "tokens/kept_p5": kept * (0.55 if entropy else 1.0),
            "tokens/kept_p95": min(TOKENS, kept * (1.7 if entropy else 1.0)),
            "fidelity/error": 1 - (kept / TOKENS) ** 0.5,
            "groups/overlap": 0.2,
            "groups/span": 4.0,
        },
        "cost": {
            "ms_backbone": 0.4 + chance.random() * 0.02,
            "ms_merge": (0.02 if merger in ("NoMerge", "RandomPrune") else 0.11) + chance.random() * 0.01,
            "ms_prior": 0.004 * kept + 0.05,
            "ms_per_sample": 0.56 + 0.004 * kept + chance.random() * 0.03,
            "prior_flops_per_sample": 2.0e5 * kept + 400 * kept**2,
            "peak_memory_bytes": 1.1e6 * kept + 5e6,
        },
        "versions": {"qm_lightning": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
    }


def write_run(run_dir: Path, content: dict[str, Any], curves: bool = True) -> Path:
    """A run directory with results.json, and curves that end near the result."""
    run_dir.mkdir(parents=True)
    (run_dir / "results.json").write_text(json.dumps(content))
    if curves:
        (run_dir / "config.yaml").write_text(f"name: image\nseed_everything: {content['seed']}\n")
        loss = content["metrics"]["quality/nats"]
        chance = random.Random(str(run_dir))
        with (run_dir / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "train/loss/target", "train/loss/total", "val/quality/nats"])
            for step in range(10, 601, 10):
                now = loss + 2.2 * math.exp(-step / 110)
                writer.writerow([step, now * (1 + chance.gauss(0, 0.05)), now * 1.1, ""])
                if step % 100 == 0:
                    writer.writerow([step, "", "", now * 1.02])
    return run_dir


def write_comparison(
    root: Path, seeds: int = 3, compressions: tuple[float, ...] = (1.5, 2.37, 4.0, 8.0)
) -> Path:
    """All methods at all compressions, and all tokens once per seed."""
    for seed in range(seeds):
        write_run(root / f"NoMerge-{seed}", results("NoMerge", None, seed, FULL_LOSS))
        for merger, losses in LOSSES.items():
            for compression in compressions:
                content = results(merger, compression, seed, losses[compression])
                write_run(root / f"{merger}-{compression}-{seed}", content)
    return root
