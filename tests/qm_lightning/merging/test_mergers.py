"""Budgets, noise and what mergers refuse."""

import pytest
import torch

from qm_lightning.errors import UserError
from qm_lightning.merging import (
    EntropyBudget,
    FixedBudget,
    MassBudget,
    NoMerge,
    QuickMerge,
    TopKPrune,
)
from qm_lightning.merging.noise import uniform
from qm_lightning.merging.salience import Salience, standardised
from qm_lightning.modules.compiling import in_buckets
from qm_lightning.tokens import AttentionStats, Tokens


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


def test_effective_tokens() -> None:
    budget = EntropyBudget(2.0)
    mask = torch.ones(1, 16, dtype=torch.bool)
    assert budget.effective_tokens(torch.full((1, 16), 0.3), mask).item() == pytest.approx(16)
    spike = torch.zeros(1, 16)
    spike[0, 3] = 5.0
    assert budget.effective_tokens(spike, mask).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.1])
def test_controller_meets_the_target(strength: float) -> None:
    budget = EntropyBudget(4.0, strength=strength).train()
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


def test_strength_lies_between_a_fixed_budget_and_the_specified_one() -> None:
    salience = make_tokens(tokens=64).values[..., 0].float()
    mask = torch.ones(3, 64, dtype=torch.bool)
    fixed, full = FixedBudget(4.0)(salience, mask), EntropyBudget(4.0).eval()(salience, mask)
    assert torch.equal(EntropyBudget(4.0, strength=0.0).eval()(salience, mask), fixed)
    half = EntropyBudget(4.0, strength=0.5).eval()(salience, mask)
    assert (fixed != full).any()
    assert ((half - fixed) * (full - half) >= 0).all()
    # By hand: 16 tokens are the target, rho is 1/4, and 64 equal tokens count as 64.
    equal = torch.zeros(1, 64)
    assert EntropyBudget(4.0, strength=0.5).eval()(equal, mask[:1]).item() == 16
    four = torch.where(torch.arange(64) < 4, 9.0, 0.0)[
        None
    ]  # N_eff = 4: (16 * 1)^(1/2) = 4, but 8 is the floor
    assert EntropyBudget(4.0, strength=0.5).eval()(four, mask[:1]).item() == 8
    assert EntropyBudget(4.0, strength=0.5, floor=0.1).eval()(four, mask[:1]).item() == 4
    with pytest.raises(UserError, match=r"EntropyBudget\(strength=2"):
        EntropyBudget(strength=2.0)


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


def test_sharpness_weighs_a_group_by_the_odds_of_its_salience() -> None:
    """The spec's toy: x at 0, 5, 90 and 95 degrees, K = 2 -> groups {0,1} and {2,3}."""
    angle = torch.deg2rad(torch.tensor([0.0, 5.0, 90.0, 95.0]))
    values = torch.stack([angle.cos(), angle.sin()], -1)[None]
    tokens = Tokens(values, torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None, :, None])
    salience = torch.tensor([[0.9, 0.1, 0.8, 0.1]], requires_grad=True)
    merger = QuickMerge(FixedBudget(2.0), locality=0.0, sharpness=0.5, noise_scale=0.0).train()
    merged = merger.merge(tokens, salience)
    # Odds 9 and 1/9, 4 and 1/9; their roots are 3 and 1/3, 2 and 1/3.
    share = 3 / (3 + 1 / 3), 2 / (2 + 1 / 3)
    expected = torch.stack(
        [
            share[0] * values[0, 0] + (1 - share[0]) * values[0, 1],
            share[1] * values[0, 2] + (1 - share[1]) * values[0, 3],
        ]
    )
    torch.testing.assert_close(merged.values[0], expected)
    merged.values[0, 0, 1].backward()  # only token 1 has height there: more of its salience, more of it
    assert salience.grad is not None
    assert salience.grad[0, 1] > 0 > salience.grad[0, 0]
    assert (salience.grad[0, 2:] == 0).all()


def test_faint_tokens_are_seen_by_training_alone() -> None:
    tokens = make_tokens()
    options = {"learn_weights": True, "sharpness": 1.0, "noise_scale": 0.0, "input_dim": 8, "layers": 2}
    plain = QuickMerge(FixedBudget(2.0), **options)  # type: ignore[arg-type]
    faint = QuickMerge(FixedBudget(2.0), faint=0.01, **options)  # type: ignore[arg-type]
    expected, found = plain.train()(tokens), faint.train()(tokens)
    assert found.faint is not None
    torch.testing.assert_close(found.compression, expected.compression)
    torch.testing.assert_close(in_buckets(found, 16).compression, expected.compression)
    assert torch.equal(found.mask, tokens.mask)
    torch.testing.assert_close(found.unmerge(), expected.unmerge())
    for b in range(len(tokens.mask)):
        anchor, by_itself = found.mask[b] & ~found.faint[b], found.faint[b]
        torch.testing.assert_close(found.values[b, anchor], expected.values[b, expected.mask[b]])
        torch.testing.assert_close(found.size[b, anchor], expected.size[b, expected.mask[b]])
        torch.testing.assert_close(found.values[b, by_itself], tokens.values[b, by_itself])
        assert (found.size[b, by_itself] == 0.01).all()
        assert torch.equal(found.ready[b, anchor], expected.ready[b, expected.mask[b]])
    # Evaluation, and training where nothing is learned, keep merged tokens alone.
    assert faint.eval()(tokens).faint is None
    with torch.no_grad():
        assert faint.train()(tokens).faint is None
    assert QuickMerge(FixedBudget(2.0), faint=0.01).train()(tokens).faint is None
    with pytest.raises(UserError, match=r"QuickMerge\(faint=1"):
        QuickMerge(faint=1.0)


def test_the_size_of_a_faint_token_teaches_salience_what_it_is_worth() -> None:
    tokens = make_tokens()
    merger = QuickMerge(
        FixedBudget(2.0),
        learn_weights=True,
        sharpness=1.0,
        noise_scale=0.0,
        faint=0.01,
        input_dim=8,
        layers=2,
    ).train()
    merged = merger(tokens)
    assert merged.faint is not None
    (merged.size * merged.faint).sum().backward()  # wants members to be seen
    assert merger.salience.readout is not None
    grad = merger.salience.readout[1].weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_no_sharpness_or_weight_makes_an_average_overflow_or_vanish() -> None:
    tokens = make_tokens()
    merger = QuickMerge(FixedBudget(4.0), sharpness=1e6).eval()
    for factor in (1.0, -1.0, 1e3):
        merged = merger.merge(tokens, factor * torch.rand(tokens.mask.shape))
        assert merged.values.isfinite().all()
        assert (merged.values[merged.mask].abs().sum(-1) > 0).all()
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"QuickMerge\(sharpness="):
            QuickMerge(sharpness=wrong)


def test_learned_salience_keeps_its_range_however_large_the_weights_grow() -> None:
    tokens = make_tokens()
    salience = Salience(learn=True)
    salience.build(8, 2)
    assert salience.readout is not None
    torch.nn.init.normal_(salience.readout[1].weight)
    few = salience(tokens)
    assert few[2, :2].sum().item() == pytest.approx(1.0)  # of two tokens, as far below a half as above it
    for parameter in (salience.weight, *salience.readout[1].parameters()):
        assert parameter is not None
        parameter.data *= 50.0
    many = salience(tokens)
    assert (many[tokens.mask] > 0).all()
    assert (many < 1).all()
    assert (many[~tokens.mask] == 0).all()
    torch.testing.assert_close(many, few, rtol=0.0, atol=1e-4)


def test_standardised_by_hand() -> None:
    """Scores 1 and 5 lie one deviation below and above their mean; 9 is padding."""
    found = standardised(
        torch.tensor([[1.0, 5.0, 9.0], [2.0, 2.0, 2.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    )
    expected = torch.tensor([[0.268941, 0.731059, 0.0], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


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


def test_coverage_gives_every_part_an_anchor() -> None:
    """4 x 4 grid, salience rises with the index: alone it takes the last row."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    grid = torch.stack([rows, columns], -1).reshape(1, 16, 2)
    tokens = Tokens(torch.randn(1, 16, 3), torch.ones(1, 16, dtype=torch.bool), grid)
    salience = torch.arange(16.0)[None] / 16

    def anchors(coverage: float) -> list[list[int]]:
        merger = QuickMerge(FixedBudget(4), coverage=coverage).eval()
        return merger.merge(tokens, salience).positions[0].tolist()

    assert anchors(0.0) == [[3, 0], [3, 1], [3, 2], [3, 3]]
    assert anchors(1.0) == [[1, 1], [1, 3], [3, 1], [3, 3]]
    with pytest.raises(UserError, match="expected a share"):
        QuickMerge(coverage=1.5)
