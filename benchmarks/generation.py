"""What a merged prompt saves when text is generated: time to first token, tokens per second, cache bytes.

The same prior (random weights, batch 1) reads prompts of several lengths whole, and merged by QuickMerge to
1/2.37 and 1/4. Claims: the cache shrinks by the compression; tokens per second gain more the longer the
prompt. The backbone's own time is the same for all and left out; the merger's is counted into the time to the
first token. Times are processor seconds on one thread, the least of interleaved rounds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._record import write_results
from qm_lightning.merging import FixedBudget, Merger, NoMerge, QuickMerge
from qm_lightning.priors import ARPrior
from qm_lightning.tokens import AttentionStats, Tokens

PROMPTS = [512, 1024, 4096, 16384]
COMPRESSIONS = [2.37, 4.0]
WIDTH, METRIC, VOCAB, NEW_TOKENS = 256, 64, 257, 48
PRIOR = {"dim": 256, "depth": 4, "heads": 4}


def main() -> None:
    """Measure, print the table, write ``benchmarks/results/generation.json``."""
    parser = argparse.ArgumentParser("python -m benchmarks generation", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="lengths in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior = ARPrior(WIDTH, VOCAB, **PRIOR, align=False).eval()
    rows = [row for n in options.prompts for row in measure(prior, make_tokens(n), options.rounds)]
    prior_text = f"{PRIOR}, {VOCAB} tokens, random weights, fp32, batch 1, {NEW_TOKENS} new tokens"
    path = write_results("generation", {"rounds": options.rounds, "prior": prior_text}, rows=rows)
    _print(rows)
    Console().print(f"written to {path}")


def make_tokens(count: int) -> Tokens:
    """A prompt of random tokens, with the statistics and keys that a backbone would give."""
    stats = AttentionStats(torch.rand(4, 1, count), torch.rand(4, 1, count))
    return Tokens(
        values=torch.randn(1, count, WIDTH),
        mask=torch.ones(1, count, dtype=torch.bool),
        positions=torch.arange(count)[None, :, None],
        attention=stats,
        metric=torch.randn(1, count, METRIC),
    )


@torch.no_grad()
def measure(prior: ARPrior, tokens: Tokens, rounds: int) -> list[dict[str, Any]]:
    """One row per compression, 1 (unmerged) first; all ways run once in every round."""
    mergers: dict[float, Merger] = {1.0: NoMerge()}
    mergers |= {c: QuickMerge(budget=FixedBudget(c)).eval() for c in COMPRESSIONS}
    rows: dict[float, dict[str, Any]] = {}
    for _ in range(rounds):
        for compression, merger in mergers.items():
            seen = once(prior, merger, tokens)
            row = {"prompt": tokens.mask.shape[1], "compression": compression} | seen
            best = rows.setdefault(compression, row)
            for name in ("merge_s", "prefill_s", "token_s"):
                best[name] = min(best[name], seen[name])
    return list(rows.values())


def once(prior: ARPrior, merger: Merger, tokens: Tokens) -> dict[str, Any]:
    """Seconds to merge, of the prior to the first token, per further token; bytes of the prompt's cache."""
    start = time.process_time()
    merged = merger(tokens)
    merge_s = time.process_time() - start
    stream = prior.stream(merged, NEW_TOKENS, temperature=0.0)
    start = time.process_time()
    next(stream)
    prefill_s = time.process_time() - start
    start = time.process_time()
    further = sum(1 for _ in stream)
    kept = merged.mask.shape[1]
    return {
        "kept": kept,
        "merge_s": merge_s,
        "prefill_s": prefill_s,
        "token_s": (time.process_time() - start) / further,
        "cache_bytes": prior.trunk.new_cache(1, kept).nbytes,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("prompt", "ratio", "kept", "first s", "x", "merging", "tokens/s", "x", box=None)
    table.add_column("cache MiB")
    table.add_column("x")
    table.title = "Generation after a merged prompt; x: against the same prior on the whole prompt"
    for row in rows:
        whole = next(r for r in rows if r["prompt"] == row["prompt"] and r["compression"] == 1.0)
        first, first_whole = (r["merge_s"] + r["prefill_s"] for r in (row, whole))
        table.add_row(
            str(row["prompt"]),
            f"{row['compression']:g}",
            str(row["kept"]),
            f"{first:.3f}",
            f"{first_whole / first:.2f}",
            f"{row['merge_s']:.3f}",
            f"{1 / row['token_s']:.0f}",
            f"{whole['token_s'] / row['token_s']:.2f}",
            f"{row['cache_bytes'] / 2**20:.1f}",
            f"{whole['cache_bytes'] / row['cache_bytes']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
