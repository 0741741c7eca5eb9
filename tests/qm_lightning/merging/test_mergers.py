"""Every merger holds the invariants of a merger, and reproduces the hand-worked cases of the specs."""

import math

import pytest
import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging import (
    EntropyBudget,
    FixedBudget,
    MassBudget,
    Merger,
    NoMerge,
    QuickMerge,
    RandomPrune,
    ToMe,
    TopKPrune,
    UniformPool,
)
from qm_lightning.merging.noise import uniform
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

MERGERS = [QuickMerge, ToMe, UniformPool, RandomPrune, TopKPrune]
AVERAGING = [ToMe, UniformPool]


def make_tokens(
    seed: int = 0, samples: int = 3, tokens: int = 24, dim: int = 8, grid: bool = False
) -> Tokens:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, tokens, dim, generator=random, dtype=torch.float64)
    lengths = torch.tensor([tokens, tokens - 5, 2])[:samples]
    mask = torch.arange(tokens) < lengths[:, None]
    index = torch.arange(tokens).expand(samples, tokens)
    positions = torch.stack([index // 6, index % 6], -1) if grid else index.unsqueeze(-1)
    entropy = torch.rand(2, samples, tokens, generator=random, dtype=torch.float64)
    norm = torch.rand(2, samples, tokens, generator=random, dtype=torch.float64)
    return Tokens(values, mask, positions, AttentionStats(entropy, norm), seeds=torch.arange(samples))


def part(tokens: Tokens, rows: slice, columns: slice) -> Tokens:
    assert tokens.attention is not None
    stats = AttentionStats(
        tokens.attention.entropy[:, rows, columns], tokens.attention.norm[:, rows, columns]
    )
    return Tokens(
        tokens.values[rows, columns],
        tokens.mask[rows, columns],
        tokens.positions[rows, columns],
        stats,
        seeds=None if tokens.seeds is None else tokens.seeds[rows],
    )


@pytest.mark.parametrize("kind", MERGERS)
@pytest.mark.parametrize("grid", [False, True])
class TestInvariants:
    def test_identity(self, kind: type[Merger], grid: bool) -> None:
        tokens = make_tokens(grid=grid)
        merged = kind(budget=FixedBudget(1.0))(tokens)  # type: ignore[call-arg]
        assert torch.equal(merged.mask, tokens.mask)
        for got, want in ((merged.values, tokens.values), (merged.positions, tokens.positions)):
            assert torch.equal(got[tokens.mask], want[tokens.mask])
        index = torch.arange(24).expand(3, 24).masked_fill(~tokens.mask, -1)
        assert torch.equal(merged.assignment, index)
        assert torch.equal(merged.size, tokens.mask.to(merged.size.dtype))

    @pytest.mark.parametrize("compression", [1.5, 2.37, 4.0, 8.0])
    def test_counts_and_order(self, kind: type[Merger], grid: bool, compression: float) -> None:
        tokens = make_tokens(grid=grid)
        merged = kind(budget=FixedBudget(compression))(tokens)  # type: ignore[call-arg]
        want = [max(1, round(n / compression)) for n in tokens.counts.tolist()]
        assert merged.mask.sum(1).tolist() == want
        for b, k in enumerate(want):
            groups = merged.assignment[b]
            assert set(groups[groups >= 0].tolist()) == set(range(k))
            assert (groups[~tokens.mask[b]] == -1).all()
            anchors = merged.anchors[b, :k]
            assert (anchors.diff() > 0).all()
            assert torch.equal(merged.positions[b, :k], tokens.positions[b, anchors])
            for j in range(k):
                last = int((groups == j).nonzero().max())
                assert last <= int(merged.ready[b, j]) < tokens.counts[b]
                assert merged.size[b, j] == (groups == j).sum()
            assert (merged.values[b, k:] == 0).all()
            assert (merged.size[b, k:] == 0).all()
        torch.testing.assert_close(merged.compression, tokens.counts.float() / torch.tensor(want).float())

    def test_batch_and_padding_change_nothing(self, kind: type[Merger], grid: bool) -> None:
        tokens = make_tokens(grid=grid)
        merged = kind().eval()(tokens)
        for b, n in enumerate(tokens.counts.tolist()):
            alone = kind().eval()(part(tokens, slice(b, b + 1), slice(0, n)))
            k = int(alone.mask.sum())
            assert k == int(merged.mask[b].sum())
            assert torch.equal(alone.values[0, :k], merged.values[b, :k])
            assert torch.equal(alone.assignment[0], merged.assignment[b, :n])

    def test_repeats_and_differentiates(self, kind: type[Merger], grid: bool) -> None:
        tokens = make_tokens(grid=grid)
        tokens.values.requires_grad_()
        first, second = kind().eval()(tokens), kind().eval()(tokens)
        assert torch.equal(first.values, second.values)
        first.values.sum().backward()
        assert tokens.values.grad is not None
        assert tokens.values.grad.abs().sum() > 0

    def test_zero_vectors_give_no_nan(self, kind: type[Merger], grid: bool) -> None:
        tokens = make_tokens(grid=grid)
        tokens.values.zero_()
        assert kind()(tokens).values.isfinite().all()

    def test_protected_stay_alone(self, kind: type[Merger], grid: bool) -> None:
        tokens = make_tokens(grid=grid)
        protected = torch.zeros_like(tokens.mask)
        protected[:, 0] = True
        with_class = Tokens(
            tokens.values,
            tokens.mask,
            tokens.positions,
            tokens.attention,
            protected=protected,
            seeds=tokens.seeds,
        )
        merged = kind(budget=FixedBudget(8.0))(with_class)  # type: ignore[call-arg]
        assert (merged.assignment[:, 0] == 0).all()
        assert (merged.size[:, 0] == 1).all()
        assert torch.equal(merged.values[:, 0], tokens.values[:, 0])


@pytest.mark.parametrize("kind", AVERAGING)
def test_averages_keep_mass_and_first_moment(kind: type[Merger]) -> None:
    tokens = make_tokens()
    merged = kind(budget=FixedBudget(4.0))(tokens)  # type: ignore[call-arg]
    assert torch.equal(merged.size.sum(1), tokens.counts.to(merged.size.dtype))
    got = (merged.values * merged.size.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(got, (tokens.values * tokens.mask.unsqueeze(-1)).sum(1))


def angles(*degrees: float, protected: bool = False) -> Tokens:
    a = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    values = torch.stack([a.cos(), a.sin()], -1)[None]
    n = len(degrees)
    guard = torch.zeros(1, n, dtype=torch.bool)
    guard[:, 0] = protected
    return Tokens(values, torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None, :, None], protected=guard)


def groups(merged: MergedTokens) -> list[list[int]]:
    a = merged.assignment[0]
    return sorted((a == k).nonzero().flatten().tolist() for k in range(int(merged.mask.sum())))


class _Keep(FixedBudget):
    def __init__(self, keep: int) -> None:
        super().__init__(1.0)
        self.keep = keep

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        return torch.full((mask.shape[0],), self.keep)


@pytest.mark.parametrize(
    ("degrees", "keep", "want"),
    [
        ((0, 20, 100, 110), 3, [[0], [1], [2, 3]]),
        ((0, 20, 100, 110), 2, [[0, 1], [2, 3]]),
        ((0, 90, 95, 1), 3, [[0, 3], [1], [2]]),
        ((0, 90, 95, 80), 3, [[0], [1, 2], [3]]),
        ((0, 1, 2.5, 90), 2, [[0, 1, 2], [3]]),
        ((0, 3, 90, 91, 180), 3, [[0, 1], [2, 3], [4]]),
    ],
)
def test_tome_hand_worked(degrees: tuple[float, ...], keep: int, want: list[list[int]]) -> None:
    assert groups(ToMe(budget=_Keep(keep))(angles(*degrees))) == want


def test_tome_leaves_the_class_token_alone() -> None:
    assert groups(ToMe(budget=_Keep(3))(angles(0, 0, 90, 91, protected=True))) == [[0], [1], [2, 3]]


def test_quickmerge_hand_worked() -> None:
    tokens = angles(0, 5, 90, 95)
    merger = QuickMerge(budget=_Keep(2), locality=0.0).eval()
    merged = merger.merge(tokens, torch.tensor([[0.9, 0.1, 0.8, 0.1]], dtype=torch.float64))
    assert groups(merged) == [[0, 1], [2, 3]]
    x = tokens.values[0]
    torch.testing.assert_close(merged.values[0, 0], (0.9 * x[0] + 0.01 * x[1]) / 0.91)
    assert merged.ready.tolist() == [[1, 3]]


def test_effective_tokens() -> None:
    budget = EntropyBudget(2.0)
    mask = torch.ones(1, 16, dtype=torch.bool)
    assert budget.effective_tokens(torch.full((1, 16), 0.3), mask).item() == pytest.approx(16)
    spike = torch.zeros(1, 16)
    spike[0, 3] = 5.0
    assert budget.effective_tokens(spike, mask).item() == pytest.approx(1, abs=1e-6)


def test_controller_meets_the_target() -> None:
    budget = EntropyBudget(4.0).train()
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(32, 64, dtype=torch.bool)
    kept = []
    for step in range(400):
        spread = torch.randint(10, 51, (32, 1), generator=random)
        # `spread` equal tokens far above the rest: N_eff is close to it.
        salience = torch.where(torch.arange(64) < spread, 5.0, 0.0)
        counts = budget(salience, mask)
        if step >= 200:
            kept.append(counts.double().mean().item())
    assert 64 / (sum(kept) / len(kept)) == pytest.approx(4.0, rel=0.02)


def test_mass_budget() -> None:
    salience = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert MassBudget(0.5)(salience, mask).item() == 1
    assert MassBudget(0.75)(salience, mask).item() == 2
    assert MassBudget(1.0)(salience, mask).item() == 3


def test_learned_salience_gets_gradients() -> None:
    tokens = make_tokens()
    merger = QuickMerge(learn_weights=True, input_dim=8, layers=2).train()
    merger(tokens).values.square().sum().backward()
    assert all(p.grad is not None for p in merger.parameters())
    assert merger.salience.weight is not None
    assert merger.salience.weight.grad is not None
    assert merger.salience.weight.grad.abs().sum() > 0


def test_noise_is_the_samples_own() -> None:
    seeds = torch.tensor([5, 9, 7])
    noise = uniform(seeds, 10, 0)
    assert torch.equal(noise[1:2], uniform(seeds[1:2], 10, 0))
    assert torch.equal(noise[:, :4], uniform(seeds, 4, 0))
    assert not torch.equal(noise, uniform(seeds, 10, 1))
    many = uniform(torch.arange(64), 1024, 3)
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert many.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_bad_input() -> None:
    with pytest.raises(UserError, match="at least 1"):
        FixedBudget(0.5)
    tokens = make_tokens()
    tokens.mask[1] = False
    with pytest.raises(UserError, match=r"samples \[1\]"):
        NoMerge()(tokens)
    bare = make_tokens()
    with pytest.raises(UserError, match="attention statistics"):
        QuickMerge()(Tokens(bare.values, bare.mask, bare.positions))


def test_unmerge() -> None:
    tokens = make_tokens()
    merged = NoMerge()(tokens)
    assert torch.equal(merged.unmerge()[tokens.mask], tokens.values[tokens.mask])
    pruned = TopKPrune()(tokens)
    assert (pruned.unmerge()[pruned.assignment < 0] == 0).all()
