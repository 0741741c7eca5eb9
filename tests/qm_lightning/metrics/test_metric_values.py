import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from qm_lightning.errors import UserError
from qm_lightning.metrics import (
    BitsPerToken,
    Compression,
    ExactMatch,
    MeanSpan,
    NatsPerToken,
    OverlapRate,
    Perplexity,
    RelativeError,
    TokenAccuracy,
    TokensKept,
    TokensKeptPercentile,
)
from qm_lightning.priors import ARPrior
from qm_lightning.tokens import MergedTokens

ALL = torch.tensor([True, True, True])


def feed(metric: Metric, *batches: Any) -> float:
    for batch in batches:
        metric.update(*batch)
    return float(metric.compute())


def sure_logits(tokens: Tensor, probability: float, vocab: int = 5) -> Tensor:
    """Logits that give ``tokens`` this probability each."""
    rest = (1 - probability) / (vocab - 1)
    p = torch.full((*tokens.shape, vocab), rest)
    return p.scatter(-1, tokens.clamp(min=0).unsqueeze(-1), probability).log()


def test_likelihood_is_per_token_over_uneven_batches() -> None:
    first = torch.tensor([[0, 1, 2], [3, -100, -100], [4, 4, 4]])
    second = torch.tensor([[1]])
    batches = [
        (sure_logits(first, 0.5), first, torch.tensor([True, True, False])),
        (sure_logits(second, 0.25), second, torch.tensor([True])),
    ]
    nats = (4 * math.log(2) + math.log(4)) / 5
    assert feed(NatsPerToken(), *batches) == pytest.approx(nats, rel=1e-5)
    assert feed(BitsPerToken(), *batches) == pytest.approx(6 / 5, rel=1e-5)
    assert feed(Perplexity(), *batches) == pytest.approx(math.exp(nats), rel=1e-5)


def test_accuracy_of_tokens_and_of_whole_sequences() -> None:
    targets = torch.tensor([[0, 1, 2], [3, 4, -100], [4, 4, 4]])
    said = torch.tensor([[0, 1, 3], [3, 4, 0], [0, 0, 0]])
    batch = (sure_logits(said, 0.9), targets, torch.tensor([True, True, False]))
    assert feed(TokenAccuracy(), batch) == pytest.approx(4 / 5)
    assert feed(ExactMatch(), batch) == pytest.approx(1 / 2)


def test_exact_match_is_that_of_free_greedy_generation() -> None:
    torch.manual_seed(0)
    prior = ARPrior(12, 4, dim=32, depth=1, heads=2).eval()
    torch.nn.init.normal_(prior.head.weight, std=1.0)
    index = torch.arange(3).expand(40, 3)
    ones = torch.ones(40, 3)
    merged = MergedTokens(torch.randn(40, 3, 12), ones.bool(), ones, index[..., None], index, index, ones)
    written = prior.generate(merged, 3, temperature=0.0)
    targets = written.clone()
    targets[::2, 1] = (targets[::2, 1] + 1) % 4
    metric = ExactMatch()
    metric.update(prior(merged, targets).logits, targets, torch.ones(40, dtype=torch.bool))
    assert float(metric.compute()) == float((written == targets).all(1).float().mean()) == 0.5


def test_compression_is_a_ratio_of_sums() -> None:
    batch = (torch.tensor([10, 100, 7]), torch.tensor([10, 20, 1]), torch.tensor([True, True, False]))
    assert feed(Compression(), batch) == pytest.approx(110 / 30)


def test_tokens_kept_mean_and_percentiles() -> None:
    kept = torch.arange(1, 21)
    some = torch.ones(20, dtype=torch.bool)
    some[-1] = False
    assert feed(TokensKept(), (kept, torch.ones(20, dtype=torch.bool))) == pytest.approx(10.5)
    assert feed(TokensKept(), (kept, some)) == pytest.approx(10.0)
    for share, want in ((0.05, 1), (0.5, 10), (0.95, 19), (1.0, 20), (0.951, 20)):
        assert feed(TokensKeptPercentile(share), (kept, torch.ones(20, dtype=torch.bool))) == want


def test_percentiles_agree_with_numpy_on_random_counts() -> None:
    import numpy as np

    counts = torch.randint(1, 300, (997,), generator=torch.Generator().manual_seed(0))
    for share in (0.05, 0.95):
        want = np.percentile(counts.numpy(), 100 * share, method="inverted_cdf")
        got = feed(TokensKeptPercentile(share), (counts, torch.ones(997, dtype=torch.bool)))
        assert got == want


def test_more_tokens_than_bins_go_to_the_last_one() -> None:
    batch = (torch.tensor([3, 500]), torch.tensor([True, True]))
    assert feed(TokensKeptPercentile(0.95, max_tokens=10), batch) == 10
    assert feed(TokensKept(max_tokens=10), batch) == pytest.approx(251.5)
    with pytest.raises(UserError, match="share=5"):
        TokensKeptPercentile(5)


def test_relative_error_is_a_mean_over_samples() -> None:
    assert feed(
        RelativeError(), (torch.tensor([0.1, 0.3, 9.0]), torch.tensor([True, True, False]))
    ) == pytest.approx(0.2)


def test_overlap_and_span_by_hand() -> None:
    assignment = torch.tensor(
        [
            [0, 0, 1, 1, 2, -1],  # contiguous: spans 2, 2, 1; no overlap in two pairs
            [0, 1, 0, 1, 1, -1],  # 0 = {0,2}, 1 = {1,3,4}: one pair, overlapping; spans 3, 4
            [0, 1, 0, 1, 0, 1],
        ]
    )
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    batch = (assignment, mask, torch.tensor([True, True, False]))
    assert feed(OverlapRate(), batch) == pytest.approx(1 / 3)
    assert feed(MeanSpan(), batch) == pytest.approx((2 + 2 + 1 + 3 + 4) / 5)


def test_overlap_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(3)
    assignment = torch.randint(-1, 5, (20, 16), generator=draw)
    assignment[:, :5] = torch.arange(5)  # no group is empty
    mask = torch.ones(20, 5, dtype=torch.bool)
    overlaps, spans = [], []
    for row in assignment.tolist():
        members = [[i for i, k in enumerate(row) if k == g] for g in range(5)]
        spans += [m[-1] - m[0] + 1 for m in members]
        overlaps += [min(b) < max(a) for a, b in itertools.pairwise(members)]
    valid = torch.ones(20, dtype=torch.bool)
    assert feed(OverlapRate(), (assignment, mask, valid)) == pytest.approx(sum(overlaps) / len(overlaps))
    assert feed(MeanSpan(), (assignment, mask, valid)) == pytest.approx(sum(spans) / len(spans))


def test_one_group_has_no_overlap() -> None:
    assert (
        feed(OverlapRate(), (torch.zeros(1, 4).long(), torch.tensor([[True]]), torch.tensor([True]))) == 0.0
    )
