"""What each merger costs, as ratios in one run: against a plain re-statement, and against a clone of its input.

Inputs are [4,N,768] with keys of width 64 and a fixed budget of half the tokens (one matching of ToMe reaches no
further). Claims: no merger grows faster than its specification says; SCOPE at N = 2048 and K = 256 takes at most
five times one similarity product. Figures are the least wall time of several interleaved rounds with two threads: run
it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import merger_restatements as plain
from benchmarks._record import write_results
from benchmarks.attention import least_times
from qm_lightning import merging
from qm_lightning.merging.base import Merger
from qm_lightning.merging.scope import pick_order
from qm_lightning.tokens import AttentionStats, Tokens

BATCH, WIDTH, KEYS, COMPRESSION = 4, 768, 64, 2.0
SIZES = [196, 576, 1024, 2048]
SCOPE_TOKENS, SCOPE_PICKS, SCOPE_LIMIT = 2048, 256, 5.0
NAIVE_LIMIT = 576  # tokens up to which naive greedy is waited for
Restatement = Callable[[Tensor, Tensor, Tensor, int], Tensor]
# Name, merger, plain re-statement, exponent of N that its specification allows.
CASES: list[tuple[str, Callable[[], Merger], Restatement | None, float]] = [
    ("QuickMerge", lambda: merging.QuickMerge(budget()), None, 2.0),
    ("UniformPool", lambda: merging.UniformPool(budget()), plain.average_pool, 1.0),
    ("RandomPrune", lambda: merging.RandomPrune(budget()), plain.top_k, 1.0),
    ("TopKPrune", lambda: merging.TopKPrune(budget()), plain.top_k, 1.0),
    ("ToMe", lambda: merging.ToMe(budget()), plain.tome, 2.0),
    ("ToFu", lambda: merging.ToFu(budget()), plain.tofu, 2.0),
    ("PiToMe", lambda: merging.PiToMe(budget()), plain.pitome, 2.0),
    ("EViT", lambda: merging.EViT(budget()), plain.evit, 1.0),
    ("DynamicViT", lambda: merging.DynamicViT(budget(), input_dim=WIDTH), None, 1.0),
    ("SCOPE", lambda: merging.SCOPE(budget()), plain.scope, 3.0),
    ("TrimTokenator", lambda: merging.TrimTokenator(budget()), plain.trim_tokenator, 2.0),
]


def budget() -> merging.FixedBudget:
    """The same for all."""
    return merging.FixedBudget(COMPRESSION)


def make_tokens(tokens: int) -> Tokens:
    """Random tokens with random statistics."""
    random = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    return Tokens(
        values=torch.randn(BATCH, tokens, WIDTH, generator=random),
        mask=torch.ones(BATCH, tokens, dtype=torch.bool),
        positions=torch.arange(tokens).expand(BATCH, tokens).unsqueeze(-1),
        attention=AttentionStats(*(rand(4, BATCH, tokens) for _ in range(3))),
        metric=torch.randn(BATCH, tokens, KEYS, generator=random),
        seeds=torch.arange(BATCH),
    )


@torch.no_grad()
def measure(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of every merger, its plain re-statement and a clone, at every size."""
    found = []
    for n in sizes:
        tokens = make_tokens(n)
        keep = round(n / COMPRESSION)
        keys = tokens.values if tokens.metric is None else tokens.metric
        score = torch.rand(BATCH, n, generator=torch.Generator().manual_seed(1))
        for name, make, restated, _ in CASES:
            merger = make().eval()
            slow = name in ("SCOPE", "TrimTokenator")
            functions: list[Callable[[], object]] = [tokens.values.clone, partial(merger, tokens)]
            if restated is not None and (name != "SCOPE" or n <= NAIVE_LIMIT):
                functions.append(partial(restated, tokens.values, keys, score, keep))
            times = least_times(functions, max(1, repeats // 3) if slow else repeats, time.perf_counter)
            found.append(
                {"merger": name, "tokens": n, "clone": times[0], "ours": times[1]}
                | ({"plain": times[2]} if len(times) > 2 else {})
            )
    return found


@torch.no_grad()
def measure_scope(repeats: int) -> dict[str, Any]:
    """Picks of SCOPE against one similarity product of the same vectors, D wide."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(BATCH, SCOPE_TOKENS, WIDTH, generator=random)
    unit = torch.nn.functional.normalize(values, dim=-1)
    mask = torch.ones(BATCH, SCOPE_TOKENS, dtype=torch.bool)
    salience = torch.rand(BATCH, SCOPE_TOKENS, generator=random)
    product, picks = least_times(
        [lambda: torch.bmm(unit, unit.mT), lambda: pick_order(unit, salience, mask, SCOPE_PICKS)],
        repeats,
        time.perf_counter,
    )
    return {"tokens": SCOPE_TOKENS, "picks": SCOPE_PICKS, "width": WIDTH, "product": product, "scope": picks}


def exponents(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Growth of each merger's time as an exponent of N, by least squares over all sizes but the smallest.

    At the smallest fixed costs rule; between two sizes alone, whether a cache still holds them does.
    """
    sizes = sorted({row["tokens"] for row in found})[1:]
    growth = {}
    for name, *_ in CASES:
        times = [r["ours"] for n in sizes for r in found if (r["merger"], r["tokens"]) == (name, n)]
        growth[name] = statistics.linear_regression(
            [math.log(n) for n in sizes], [math.log(t) for t in times]
        ).slope
    return growth


def main() -> None:
    """Measure, print tables, write ``benchmarks/results/mergers.json``."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tokens (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=9, help="rounds (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    found = measure(chosen.sizes, chosen.repeats)
    configuration = {
        "clock": "wall time, least of the rounds",
        "rounds": chosen.repeats,
        "input": f"[{BATCH},N,{WIDTH}] fp32, keys of width {KEYS}, FixedBudget({COMPRESSION:g}), evaluation",
    }
    results = {
        "times": found,
        "exponents": exponents(found) if len(chosen.sizes) > 2 else {},
        "scope": measure_scope(max(1, chosen.repeats // 3)),
    }
    path = write_results("mergers", configuration, **results)
    _print(results)
    Console().print(f"written to {path}")


def _print(results: dict[str, Any]) -> None:
    console = Console()
    sizes = sorted({row["tokens"] for row in results["times"]})
    table = Table("merger", *(f"N = {n}" for n in sizes), "exponent (allowed)")
    table.title = "Time in plain re-statements / in clones of the input"
    for name, _, _, allowed in CASES:
        cells = []
        for n in sizes:
            row = next(r for r in results["times"] if r["merger"] == name and r["tokens"] == n)
            against = f"{row['ours'] / row['plain']:.2f}x" if "plain" in row else "-"
            cells.append(f"{against} / {row['ours'] / row['clone']:.0f}x")
        grown = results["exponents"].get(name)
        table.add_row(name, *cells, "-" if grown is None else f"{grown:.2f} ({allowed:g})")
    console.print(table)
    scope = results["scope"]
    console.print(
        f"SCOPE, {scope['picks']} of {scope['tokens']} tokens: {scope['scope'] / scope['product']:.2f} similarity "
        f"products (claim: at most {SCOPE_LIMIT:g})"
    )


if __name__ == "__main__":
    main()
