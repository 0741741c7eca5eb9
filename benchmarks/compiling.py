"""What torch.compile brings on prior and merger: compiled against eager, in interleaved rounds.

Parts and sizes of `configs/experiment/text_streaming.yaml` (batch 16, 256 tokens, random values) and of the image
experiment (batch 64, 64 tokens). The merger alone is timed forward, as it has no weights; its outputs and the
prior's logits are compared with eager ones. Times are processor seconds on one thread.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._record import write_results
from qm_lightning.merging import FixedBudget, QuickMerge, StreamingQuickMerge
from qm_lightning.modules.compiling import CompileOptions, compile_in_place, in_buckets
from qm_lightning.priors import ARPrior, StreamingPrior
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

BOTH = CompileOptions(prior=True, merger=True)


def main() -> None:
    """Measure, print the table, write `benchmarks/results/compiling.json`."""
    parser = argparse.ArgumentParser("python -m benchmarks compiling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, image = random_tokens(16, 256, 128), random_tokens(64, 64, 96)
    ids = torch.randint(0, 256, (16, 256))
    labels = torch.randint(0, 11, (64, 5))
    rows = [
        *measure(
            "streaming", StreamingQuickMerge(FixedBudget(2.37)), StreamingPrior(128, 257), text, ids, rounds
        ),
        *measure("conditioning", QuickMerge(FixedBudget(2.37)), ARPrior(96, 11), image, labels, rounds),
    ]
    path = write_results("compiling", {"rounds": rounds}, rows=rows)
    table = Table(
        "mode", "part", "eager ms", "compiled ms", "x", "first call s", "largest difference", box=None
    )
    for row in rows:
        table.add_row(
            row["mode"],
            row["part"],
            *(f"{row[name]:.1f}" for name in ("eager_ms", "compiled_ms")),
            f"{row['eager_ms'] / row['compiled_ms']:.2f}",
            f"{row['first_call_s']:.0f}",
            f"{row['difference']:.1e}",
        )
    console = Console()
    console.print(table)
    console.print(f"written to {path}")


def random_tokens(batch: int, count: int, width: int) -> Tokens:
    """Tokens with the statistics that a backbone would give."""
    return Tokens(
        values=torch.randn(batch, count, width),
        mask=torch.ones(batch, count, dtype=torch.bool),
        positions=torch.arange(count).expand(batch, count).unsqueeze(-1),
        attention=AttentionStats(torch.rand(3, batch, count), torch.rand(3, batch, count)),
        metric=torch.randn(batch, count, width // 4),
    )


def measure(
    mode: str,
    merger: QuickMerge | StreamingQuickMerge,
    prior: ARPrior | StreamingPrior,
    tokens: Tokens,
    targets: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    """One row per part."""
    merger.eval()
    if isinstance(merger, StreamingQuickMerge):
        merger.threshold.threshold.fill_(0.5)
    fast_merger, fast_prior = copy.deepcopy(merger), copy.deepcopy(prior)
    compile_in_place(fast_prior, fast_merger, BOTH)
    merged = in_buckets(merger(tokens), BOTH.bucket)

    def step(part: ARPrior | StreamingPrior) -> Callable[[], Tensor]:
        def run() -> Tensor:
            logits: Tensor = part(merged, targets).logits
            torch.autograd.backward(logits.sum())
            return logits.detach()

        return run

    def merge(part: QuickMerge | StreamingQuickMerge) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                out: MergedTokens = part(tokens)
            return out.values

        return run

    return [
        {"mode": mode, "part": "prior", **compare(step(prior), step(fast_prior), rounds)},
        {"mode": mode, "part": "merger", **compare(merge(merger), merge(fast_merger), rounds)},
    ]


def compare(eager: Callable[[], Tensor], compiled: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Least milliseconds of either; seconds of the compiled one's first call; how far their outputs differ."""
    start = time.perf_counter()
    compiled()
    first = time.perf_counter() - start
    best = {"eager": float("inf"), "compiled": float("inf")}
    outputs: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, call in (("eager", eager), ("compiled", compiled)):
            seconds, outputs[name] = timed(call)
            best[name] = min(best[name], seconds)
    return {
        "eager_ms": best["eager"] * 1e3,
        "compiled_ms": best["compiled"] * 1e3,
        "first_call_s": first,
        "difference": float((outputs["eager"] - outputs["compiled"]).abs().max()),
    }


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of a call, and what it returns."""
    start = time.process_time()
    out = call()
    return time.process_time() - start, out


if __name__ == "__main__":
    main()
