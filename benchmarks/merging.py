"""QuickMerge on [4,1024,768] to 432 tokens, beside ToMe and beside clustering each sample with scikit-learn.

Claims (one run, one machine): at most the time of ToMe's matching and merge for the same reduction, both on the same
64-wide keys; at most 1/20 of agglomerative clustering sample by sample, as the paper's public code does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._record import write_results
from benchmarks.attention import least_times
from qm_lightning.merging import FixedBudget, QuickMerge, ToMe
from qm_lightning.tokens import AttentionStats, Tokens

BATCH, TOKENS, WIDTH, KEYS, KEPT = 4, 1024, 768, 64, 432
ROUNDS = 7


def main() -> None:
    """Measure, print a table, write ``benchmarks/results/merging.json``."""
    tokens, budget = make_tokens(), FixedBudget(TOKENS / KEPT)
    # ToMe's one matching cannot remove more than half: the same reduction takes it two.
    calls: dict[str, Callable[[], object]] = {
        "QuickMerge": partial(QuickMerge(budget).eval(), tokens),
        "QuickMerge, 768-wide": partial(QuickMerge(budget).eval(), make_tokens(keys=None)),
        "ToMe": partial(ToMe(budget).eval(), tokens),
        "scikit-learn": partial(clustered, tokens.values, KEPT),
    }
    with torch.no_grad():
        assert QuickMerge(budget).eval()(tokens).values.shape[1] == KEPT
        seconds = dict(zip(calls, least_times(list(calls.values()), repeats=ROUNDS), strict=True))
    ours = seconds["QuickMerge"]
    table = Table("method", "ms", "QuickMerge / method", title=f"[{BATCH},{TOKENS},{WIDTH}] to {KEPT} tokens")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{ours / value:.3f}")
    Console().print(table)
    shape = {"shape": [BATCH, TOKENS, WIDTH], "kept": KEPT, "keys": KEYS, "rounds": ROUNDS}
    Console().print(f"written to {write_results('merging', shape, seconds=seconds)}")


def make_tokens(keys: int | None = KEYS) -> Tokens:
    """Random tokens; ``keys=None``: similarity compares the values themselves."""
    random = torch.Generator().manual_seed(0)
    return Tokens(
        values=torch.randn(BATCH, TOKENS, WIDTH, generator=random),
        mask=torch.ones(BATCH, TOKENS, dtype=torch.bool),
        positions=torch.arange(TOKENS).expand(BATCH, TOKENS).unsqueeze(-1),
        attention=AttentionStats(*(torch.rand(4, BATCH, TOKENS, generator=random) for _ in range(2))),
        metric=None if keys is None else torch.randn(BATCH, TOKENS, keys, generator=random),
    )


def clustered(values: Tensor, kept: int) -> Tensor:
    """Agglomerative clustering and means, one sample after the other; [B,N,D] -> [B,kept,D]."""
    from sklearn.cluster import AgglomerativeClustering

    found = []
    for sample in values:
        labels = torch.from_numpy(AgglomerativeClustering(kept).fit_predict(sample.numpy()))
        sums = torch.zeros(kept, sample.shape[1]).index_add(0, labels, sample)
        found.append(sums / labels.bincount(minlength=kept)[:, None])
    return torch.stack(found)


if __name__ == "__main__":
    main()
