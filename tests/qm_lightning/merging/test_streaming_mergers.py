"""Hand-worked cases of the streaming mergers (reduction.md, section 7), their budgets and their losses."""

import math

import pytest
import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging import (
    DynamicPooling,
    EntropyBudget,
    EntropyThreshold,
    FixedBudget,
    FixedStride,
    LearnedRouter,
    MassBudget,
    StreamingQuickMerge,
)
from qm_lightning.merging.base import Merger
from qm_lightning.merging.streaming_base import cap_spans, merge_spans
from qm_lightning.merging.streaming_quickmerge import causal_features
from qm_lightning.merging.streaming_threshold import ClosingThreshold
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens


def make_tokens(values: Tensor, mask: Tensor | None = None, **more: Tensor | AttentionStats) -> Tokens:
    B, N, _ = values.shape
    mask = torch.ones(B, N, dtype=torch.bool) if mask is None else mask
    return Tokens(values, mask, torch.arange(N)[None, :, None].expand(B, N, 1), **more)


def random_tokens(B: int = 4, N: int = 64, D: int = 6, seed: int = 0) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    stats = AttentionStats(torch.rand(2, B, N, generator=draw), torch.rand(2, B, N, generator=draw) + 0.5)
    ids = torch.randint(0, 9, (B, N), generator=draw)
    return make_tokens(torch.randn(B, N, D, generator=draw), attention=stats, ids=ids)


def groups_of(merged: MergedTokens, row: int = 0) -> list[list[int]]:
    assignment = merged.assignment[row].tolist()
    return [
        [i for i, k in enumerate(assignment) if k == group] for group in range(int(merged.mask[row].sum()))
    ]


def angles(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1).unsqueeze(0)


def test_closing_boundaries_by_hand() -> None:
    # b = (0,1,0,1,0) on h = 1..5: means 1.5 and 3.5, and the open span (reduction.md, dynamic pooling).
    values = torch.arange(1.0, 6.0)[None, :, None]
    merged = merge_spans(make_tokens(values), torch.tensor([[0, 1, 0, 1, 0]]).bool(), torch.ones(1, 5))
    assert merged.values.flatten().tolist() == [1.5, 3.5, 5.0]
    assert merged.ready.tolist() == [[1, 3, 5]]  # the last is never ready in this text
    assert merged.size.tolist() == [[2.0, 2.0, 1.0]]
    assert merged.positions.flatten().tolist() == [1, 3, 4]


def test_weights_share_a_span() -> None:
    values = torch.tensor([[[1.0], [3.0], [9.0]]])
    merged = merge_spans(
        make_tokens(values), torch.tensor([[False, True, True]]), torch.tensor([[3.0, 1.0, 5.0]])
    )
    assert merged.values.flatten().tolist() == [1.5, 9.0]


def test_a_protected_token_is_alone_and_ends_the_span_before_it_when_seen() -> None:
    protected = torch.tensor([[False, False, True, False, False]])
    tokens = make_tokens(torch.randn(1, 5, 2), protected=protected)
    merged = merge_spans(tokens, torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 5))
    assert groups_of(merged) == [[0, 1], [2], [3, 4]]
    assert merged.ready.tolist() == [[2, 2, 5]]
    routed = LearnedRouter(FixedBudget(2.0), input_dim=2).eval()(tokens)
    assert [2] in groups_of(routed)


def test_long_spans_are_cut() -> None:
    ends = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    assert cap_spans(ends, 3).long().tolist() == [[0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]
    assert cap_spans(torch.zeros(1, 7).bool(), 2).long().tolist() == [[0, 1, 0, 1, 0, 1, 0]]
    assert torch.equal(cap_spans(ends, None), ends)


@pytest.mark.parametrize(
    ("compression", "lengths"), [(2.0, [2, 2, 2, 1]), (3.0, [3, 3, 1]), (2.5, [3, 2, 2])]
)
def test_fixed_stride(compression: float, lengths: list[int]) -> None:
    merged = FixedStride(FixedBudget(compression))(make_tokens(torch.randn(1, 7, 2)))
    assert [len(group) for group in groups_of(merged)] == lengths


def test_fixed_stride_meets_a_fraction() -> None:
    merged = FixedStride(FixedBudget(2.37))(make_tokens(torch.randn(1, 2370, 1)))
    assert float(merged.compression) == pytest.approx(2.37, rel=1e-3)


def test_entropy_patching_by_hand() -> None:
    # H = (2, .3, 1.5, .2, 2.5, .1), threshold 1 -> spans start at 0, 1, 3, 5 (reduction.md, BLT).
    merger = EntropyThreshold(FixedBudget(2.0), vocab_size=50, max_span=None, input_dim=2).eval()
    merger.threshold.threshold.fill_(1.0)
    merger.signal = lambda logits: torch.tensor([[2.0, 0.3, 1.5, 0.2, 2.5, 0.1]])
    merged = merger(make_tokens(torch.randn(1, 6, 2)))
    assert [group[0] for group in groups_of(merged)] == [0, 1, 3, 5]
    assert [len(group) for group in groups_of(merged)] == [1, 2, 2, 1]


def test_entropy_is_that_of_the_next_token() -> None:
    merger = EntropyThreshold(vocab_size=4, input_dim=2)
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]])
    signal = merger.signal(p.clamp(min=1e-30).log())[0]
    assert signal.tolist() == [float("inf"), pytest.approx(math.log(4)), pytest.approx(0.0, abs=1e-6)]
    rise = EntropyThreshold(vocab_size=4, monotone=True, input_dim=2).signal(p.clamp(min=1e-30).log())[0]
    assert rise.tolist() == [float("inf"), pytest.approx(math.log(2)), pytest.approx(-math.log(4))]


def test_router_by_hand() -> None:
    # Angles (0, 0, 90, 90, 270): p = (1, 0, .5, 0, 1) (reduction.md, H-Net); .5 is a tie, so 91 in its place.
    router = LearnedRouter(FixedBudget(2.0), input_dim=2).double().eval()
    p = router.probability(angles(0, 0, 90, 90, 270))
    assert p[0].tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0, 1.0], abs=1e-6)
    values = angles(0, 0, 91, 91, 271)
    merged = router(make_tokens(values))
    assert groups_of(merged) == [[0, 1], [2, 3], [4]]
    assert merged.ready.tolist() == [[0, 2, 4]]
    assert torch.equal(merged.values[0], values[0, [0, 2, 4]])
    assert merged.size.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(("share", "want"), [(0.25, 1.0), (0.1, 1.12), (1.0, 4.0)])
def test_ratio_loss_by_hand(share: float, want: float) -> None:
    router = LearnedRouter(FixedBudget(4.0), input_dim=2)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[:, : int(20 * share)] = True
    mask = torch.ones(1, 20, dtype=torch.bool)
    chosen = router.start_share(starts, mask)
    assert float(chosen) == pytest.approx(share)
    assert float(router.ratio_loss(torch.full((1, 20), share), chosen, mask)) == pytest.approx(want, rel=1e-5)


def test_boundary_loss_is_binomial() -> None:
    merger = DynamicPooling(FixedBudget(4.0), input_dim=2)
    chosen = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 1.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    want = -torch.distributions.Binomial(5, torch.tensor(0.25)).log_prob(torch.tensor(2.0)) / 5
    assert float(merger.boundary_loss(chosen, mask)) == pytest.approx(float(want), rel=1e-5)


def test_causal_features_against_a_loop() -> None:
    stats = AttentionStats(torch.rand(2, 1, 9).double(), torch.rand(2, 1, 9).double())
    features = causal_features(stats, torch.ones(1, 9, dtype=torch.bool))
    for layer in range(2):
        for i in range(9):
            norm = stats.norm[layer, 0]
            mean = norm[: i + 1].mean()
            assert float(features[1, layer, 0, i]) == pytest.approx(float(norm[i] / (norm[i] + mean)))
            assert float(features[0, layer, 0, i]) == pytest.approx(1.0 - float(stats.entropy[layer, 0, i]))


@pytest.mark.parametrize("compression", [2.37, 4.0, 8.0])
def test_the_controller_meets_the_compression_and_rests_in_evaluation(compression: float) -> None:
    threshold = ClosingThreshold(compression, 0.5)
    mask = torch.ones(8, 256, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    spans = []
    for step in range(200):
        signal = torch.rand(8, 256, generator=draw).pow(3)
        closes = cap_spans(threshold(signal), 16)
        threshold.adapt(signal, mask, closes.sum(1))
        spans += [closes.sum().item()] if step >= 100 else []
    assert 100 * mask.sum().item() / sum(spans) == pytest.approx(compression, rel=0.02)


@pytest.mark.parametrize(
    "merger",
    [
        StreamingQuickMerge(FixedBudget(3.0)),
        EntropyThreshold(vocab_size=9, input_dim=6),
        DynamicPooling(FixedBudget(3.0), input_dim=6),
    ],
)
def test_training_moves_the_threshold_and_evaluation_does_not(merger: Merger) -> None:
    before = merger.threshold.threshold.clone()
    merger.eval()(random_tokens())
    assert torch.equal(merger.threshold.threshold, before)
    merger.train()(random_tokens())
    assert not torch.equal(merger.threshold.threshold, before)
    assert "threshold.threshold" in merger.state_dict()


def test_the_aim_of_the_router_follows_its_starts() -> None:
    router = LearnedRouter(FixedBudget(4.0), gain=0.5, input_dim=6)
    assert float(router.aim.sigmoid()) == pytest.approx(0.25)
    router.eval()(random_tokens())
    for share, moved in (
        (0.25, 0.0),
        (0.5, -0.5),
        (1.0, -0.5),
        (0.125, 0.25),
    ):  # never more than twice too many
        before = router.aim.clone()
        router.adapt(torch.tensor(share))
        assert float(router.aim - before) == pytest.approx(moved)
    assert "aim" in router.state_dict()


def words(seed: int, batch: int = 16) -> Tokens:
    """Noisy words of a small vocabulary, much alike to begin with."""
    vocabulary = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)) + 1.0
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (batch, 64), generator=draw)
    return make_tokens(vocabulary[ids] + 0.3 * torch.randn(batch, 64, 16, generator=draw))


@pytest.mark.parametrize("compression", [2.37, 4.0])
@pytest.mark.parametrize("cls", [LearnedRouter, DynamicPooling])
def test_learned_spans_hold_the_compression(
    cls: type[LearnedRouter | DynamicPooling], compression: float
) -> None:
    """Against a loss that gains by every further span."""
    torch.manual_seed(0)
    merger, steps = cls(FixedBudget(compression), input_dim=16).train(), 200
    optimizer = torch.optim.AdamW(merger.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        tokens = words(step)
        merged = merger(tokens)
        loss = (merged.unmerge() - tokens.values).square().mean() + sum(merged.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    merged = merger.eval()(words(10**6, batch=128))
    assert merged.assignment.numel() / float(merged.mask.sum()) == pytest.approx(compression, rel=0.1)


def test_losses_and_gradients_in_training_only() -> None:
    learners = {
        "entropy_model": EntropyThreshold(FixedBudget(2.0), vocab_size=9, input_dim=6),
        "ratio": LearnedRouter(FixedBudget(2.0), input_dim=6),
        "boundaries": DynamicPooling(FixedBudget(2.0), input_dim=6),
    }
    for name, merger in learners.items():
        assert not merger.eval()(random_tokens()).losses
        merged = merger.train()(random_tokens())
        assert list(merged.losses) == [name]
        (merged.losses[name] + merged.values.square().sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in merger.parameters()), name


def test_the_gate_of_the_router_and_the_pooling_gets_gradient_from_the_values() -> None:
    for merger in (
        LearnedRouter(FixedBudget(2.0), input_dim=6),
        DynamicPooling(FixedBudget(2.0), input_dim=6),
    ):
        merger.train()(random_tokens()).values.pow(3).sum().backward()
        assert sum(float(p.grad.abs().sum()) for p in merger.parameters()) > 0


def test_draws_follow_the_sample_not_the_batch() -> None:
    merger = DynamicPooling(FixedBudget(2.0), input_dim=6).train()
    tokens = random_tokens()
    seeds = torch.tensor([5, 6, 7, 8])
    whole = merger(make_tokens(tokens.values, seeds=seeds))
    alone = merger(make_tokens(tokens.values[2:3], seeds=seeds[2:3]))
    assert groups_of(whole, 2) == groups_of(alone)


MAKERS = [
    lambda c: StreamingQuickMerge(FixedBudget(c)),
    lambda c: FixedStride(FixedBudget(c)),
    lambda c: EntropyThreshold(FixedBudget(c), vocab_size=9, input_dim=6),
    lambda c: LearnedRouter(FixedBudget(c), input_dim=6),
    lambda c: DynamicPooling(FixedBudget(c), input_dim=6),
]


@pytest.mark.parametrize("make", MAKERS)
def test_compression_one_is_the_identity(make: object) -> None:
    tokens = random_tokens()
    for merger in (make(1.0).eval(), make(1.0).train()):
        merged = merger(tokens)
        assert torch.equal(merged.values, tokens.values)
        assert torch.equal(merged.assignment, torch.arange(64).expand(4, 64))
        assert torch.equal(merged.ready, torch.arange(64).expand(4, 64))
        assert (merged.size == 1).all()


@pytest.mark.parametrize("make", MAKERS)
def test_groups_are_contiguous_and_ready_never_falls(make: object) -> None:
    merged = make(3.0).eval()(random_tokens())
    steps = merged.assignment.diff(dim=1)
    assert ((steps == 0) | (steps == 1)).all()
    assert (merged.ready.diff(dim=1)[merged.mask[:, 1:]] >= 0).all()


@pytest.mark.parametrize("budget", [EntropyBudget(2.0), MassBudget(0.8)])
def test_budgets_that_read_the_whole_sequence_are_refused(budget: object) -> None:
    with pytest.raises(UserError, match="reads the whole sequence"):
        FixedStride(budget)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="max_span=4 cannot reach compression=8"):
        StreamingQuickMerge(FixedBudget(8.0), max_span=4)
    bare = make_tokens(torch.randn(1, 4, 6))
    with pytest.raises(UserError, match="needs attention statistics"):
        StreamingQuickMerge()(bare)
    for merger in (EntropyThreshold(), LearnedRouter(), DynamicPooling()):
        with pytest.raises(UserError, match="input_dim="):
            merger(bare)
    with pytest.raises(UserError, match=r"found no Tokens\.ids"):
        EntropyThreshold(vocab_size=9, input_dim=6).train()(bare)
