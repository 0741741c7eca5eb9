"""Every merger holds the invariants P1 to P10 of the spec (reduction.md, section 1)."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merger_cases import CASES, Case, cut, make_case, make_tokens

from qm_lightning.errors import UserError
from qm_lightning.merging import EntropyBudget, FixedBudget
from qm_lightning.tokens import MergedTokens, Tokens

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
FEW = settings(deadline=None, max_examples=8, derandomize=True)
INPUTS = st.builds(
    make_tokens,
    seed=st.integers(0, 10**6),
    tokens=st.integers(4, 30),
    axes=st.sampled_from([1, 2, 3]),
    protected=st.integers(0, 2),
    metric=st.booleans(),
    text=st.booleans(),
)
COMPRESSIONS = st.sampled_from([1.0, 1.5, 2.37, 4.0, 8.0])


def expected_counts(case: Case, tokens: Tokens, compression: float) -> list[int]:
    if not case.budgeted:
        return tokens.counts.tolist()
    protected = 0 if tokens.protected is None else int(tokens.protected[0].sum())
    rows = []
    for n in tokens.counts.tolist():
        least = min(n, protected + 1) if tokens.protected is not None else 1
        rows.append(max(least, round(n / compression)))
    return rows


@EVERY
@FEW
@given(tokens=INPUTS)
def test_p1_nothing_to_remove_is_identity(case: Case, tokens: Tokens) -> None:
    for budget in (FixedBudget(1.0), EntropyBudget(1.0)):
        merged = make_case(case, budget).train(not case.masks)(tokens)
        real = tokens.mask
        assert torch.equal(merged.mask, real)
        assert torch.equal(merged.values[real], tokens.values[real])
        assert torch.equal(merged.positions[real], tokens.positions[real])
        index = torch.arange(real.shape[1]).expand(real.shape)
        assert torch.equal(merged.assignment, index.masked_fill(~real, -1))
        assert torch.equal(merged.size, real.to(merged.size.dtype))


@EVERY
@FEW
@given(tokens=INPUTS, compression=COMPRESSIONS)
def test_p2_p4_counts_partition_and_mass(case: Case, tokens: Tokens, compression: float) -> None:
    merged = make_case(case, FixedBudget(compression)).train(not case.masks)(tokens)
    want = expected_counts(case, tokens, compression)
    assert merged.mask.sum(1).tolist() == want
    assert torch.equal(merged.mask, torch.arange(max(want)) < torch.tensor(want)[:, None])
    for b, k in enumerate(want):
        group = merged.assignment[b]
        assert set(group[group >= 0].tolist()) == set(range(k))
        assert (group[~tokens.mask[b]] == -1).all()
        if case.keeps_mass:
            assert (group[tokens.mask[b]] >= 0).all()
        members = torch.bincount(group[group >= 0], minlength=k)
        assert torch.equal(merged.size[b, :k], members.to(merged.size.dtype))
        assert not merged.values[b, k:].any()
        assert not merged.size[b, k:].any()
    torch.testing.assert_close(merged.compression, tokens.counts.float() / torch.tensor(want).float())


@EVERY
@FEW
@given(tokens=INPUTS, compression=COMPRESSIONS)
def test_order_anchors_and_ready(case: Case, tokens: Tokens, compression: float) -> None:
    extent = tokens.positions.masked_fill(~tokens.mask.unsqueeze(-1), -1).flatten(1).amax(1) + 1
    merged = make_case(case, FixedBudget(compression))(tokens)
    assert merged.end is not None
    assert torch.equal(merged.end, extent)
    assert merged.anchors is not None
    for b, k in enumerate(merged.mask.sum(1).tolist()):
        anchors = merged.anchors[b, :k]
        assert (anchors.diff() > 0).all()
        assert torch.equal(merged.positions[b, :k], tokens.positions[b, anchors])
        # What training alone keeps may be a member of another's group.
        full = torch.ones(k, dtype=torch.bool) if merged.faint is None else ~merged.faint[b, :k]
        assert merged.faint is None or case.masks
        assert torch.equal(merged.assignment[b, anchors[full]], torch.arange(k)[full])
        for j in full.nonzero().flatten().tolist():
            last = int((merged.assignment[b] == j).nonzero().max())
            assert last <= int(merged.ready[b, j]) < tokens.counts[b]


@EVERY
@FEW
@given(tokens=INPUTS, compression=COMPRESSIONS)
def test_p3_first_moment_or_plain_values(case: Case, tokens: Tokens, compression: float) -> None:
    merged = make_case(case, FixedBudget(compression)).eval()(tokens)
    if case.averages:
        got = (merged.values * merged.size.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(got, (tokens.values * tokens.mask.unsqueeze(-1)).sum(1))
    if case.plain_values:
        assert merged.anchors is not None
        for b, k in enumerate(merged.mask.sum(1).tolist()):
            assert torch.equal(merged.values[b, :k], tokens.values[b, merged.anchors[b, :k]])


@EVERY
@FEW
@given(tokens=INPUTS, compression=COMPRESSIONS, training=st.booleans())
def test_p5_p6_batch_and_padding_change_nothing(
    case: Case, tokens: Tokens, compression: float, training: bool
) -> None:
    # Padding may hold anything.
    tokens.values[~tokens.mask] = float("nan")
    merged = make_case(case, FixedBudget(compression)).train(training)(tokens)
    for b, n in enumerate(tokens.counts.tolist()):
        alone = cut(tokens, slice(b, b + 1), slice(0, n))
        single = make_case(case, FixedBudget(compression)).train(training)(alone)
        k = int(single.mask.sum())
        assert k == int(merged.mask[b].sum())
        assert torch.equal(single.values[0], merged.values[b, :k])
        assert torch.equal(single.assignment[0], merged.assignment[b, :n])
        assert torch.equal(single.size[0], merged.size[b, :k])
        assert torch.equal(single.ready[0], merged.ready[b, :k])
    assert not merged.values[~merged.mask].any()


@EVERY
def test_p7_gradients_reach_values_and_parameters(case: Case) -> None:
    tokens = make_tokens(protected=1)
    tokens.values.requires_grad_()
    merger = make_case(case).train()
    merged = merger(tokens)
    (merged.values.square().sum() + sum(merged.losses.values(), torch.zeros(()))).backward()
    assert tokens.values.grad is not None
    assert tokens.values.grad[tokens.mask].abs().sum() > 0
    assert tokens.values.grad.isfinite().all()
    assert not tokens.values.grad[~tokens.mask].any()
    for name, parameter in merger.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if list(merger.parameters()):
        assert sum(float(p.grad.abs().sum()) for p in merger.parameters() if p.grad is not None) > 0


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_p8_same_seed_same_result(case: Case, training: bool) -> None:
    tokens = replace(make_tokens(), seeds=None)
    results = [make_case(case).train(training)(tokens) for _ in range(2)]
    assert torch.equal(results[0].values, results[1].values)
    assert torch.equal(results[0].assignment, results[1].assignment)


@EVERY
def test_p8_autocast_and_bfloat16_choose_as_float32(case: Case) -> None:
    tokens = make_tokens(tokens=30, metric=True)
    values, metric = tokens.values.bfloat16(), tokens.metric
    assert metric is not None
    assert tokens.attention is not None
    small = replace(tokens, values=values, metric=metric.bfloat16())
    text = tokens.context
    assert text is not None
    small = replace(small, context=replace(text, values=text.values.bfloat16()))
    wide = replace(
        small,
        values=values.float(),
        metric=metric.bfloat16().float(),
        context=replace(text, values=text.values.bfloat16().float()),
    )
    merger = make_case(case).float().eval()
    want = merger(wide)
    for inputs in (small, wide):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got: MergedTokens = merger(inputs)
        assert torch.equal(got.assignment, want.assignment)
        assert got.values.dtype == inputs.values.dtype
        torch.testing.assert_close(got.values.float(), want.values, rtol=1e-2, atol=1e-2)


@EVERY
def test_p9_zero_vectors_give_no_nan(case: Case) -> None:
    tokens = make_tokens()
    tokens.values[:, ::2] = 0.0
    tokens.values.requires_grad_()
    merged = make_case(case, FixedBudget(4.0))(tokens)
    assert merged.values.isfinite().all()
    merged.values.sum().backward()
    assert tokens.values.grad is not None
    assert tokens.values.grad.isfinite().all()


@EVERY
@FEW
@given(seed=st.integers(0, 10**6), axes=st.sampled_from([1, 2]))
def test_p10_twice(case: Case, seed: int, axes: int) -> None:
    tokens = make_tokens(seed=seed, axes=axes)
    merger = make_case(case, FixedBudget(2.0)).eval()
    first = merger(tokens)
    again = make_tokens(seed=seed + 1, tokens=first.mask.shape[1])
    middle = replace(
        again,
        values=first.values,
        mask=first.mask,
        positions=first.positions,
        size=first.size,
        seeds=tokens.seeds,
    )
    second = merger(middle)
    chained = torch.where(
        first.assignment >= 0, second.assignment.gather(1, first.assignment.clamp(min=0)), -1
    )
    for b, k in enumerate(second.mask.sum(1).tolist()):
        members = torch.bincount(chained[b][chained[b] >= 0], minlength=k)
        assert torch.equal(second.size[b, :k], members.to(second.size.dtype))
    if case.keeps_mass:
        assert torch.equal(second.size.sum(1), tokens.counts.to(second.size.dtype))
    if case.averages:
        got = (second.values * second.size.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(got, (tokens.values * tokens.mask.unsqueeze(-1)).sum(1))


@EVERY
@FEW
@given(tokens=INPUTS, where=st.integers(0, 3), compression=COMPRESSIONS)
def test_protected_tokens_stay_alone(case: Case, tokens: Tokens, where: int, compression: float) -> None:
    index = torch.arange(tokens.mask.shape[1])
    protected = ((index % 4 == where) & tokens.mask).clone()
    tokens = replace(tokens, protected=protected)
    merged = make_case(case, FixedBudget(compression)).eval()(tokens)
    alone = merged.assignment[protected]
    rows = protected.nonzero()[:, 0]
    assert (alone >= 0).all()
    assert (merged.size[rows, alone] == 1).all()
    assert torch.equal(merged.values[rows, alone], tokens.values[protected])


@EVERY
@pytest.mark.parametrize("budget", [EntropyBudget(3.0), FixedBudget(3.0)], ids=["entropy", "fixed"])
def test_any_budget(case: Case, budget: EntropyBudget | FixedBudget) -> None:
    tokens = make_tokens(tokens=30)
    want = budget.eval()(1.0 - make_tokens(tokens=30).values[..., 0], tokens.mask)
    merged = make_case(case, budget).eval()(tokens)
    kept = merged.mask.sum(1)
    assert (kept >= 1).all()
    assert (kept <= tokens.counts).all()
    if isinstance(budget, FixedBudget) and case.budgeted:
        assert torch.equal(kept, want)


@EVERY
def test_an_empty_sample_is_named(case: Case) -> None:
    tokens = make_tokens()
    tokens.mask[1] = False
    with pytest.raises(UserError, match=r"samples \[1\].*no valid token"):
        make_case(case)(tokens)


@EVERY
def test_unmerge_gives_each_token_its_groups_value(case: Case) -> None:
    tokens = make_tokens()
    merged = make_case(case)(tokens)
    back = merged.unmerge()
    for b, i in (merged.assignment >= 0).nonzero().tolist():
        assert torch.equal(back[b, i], merged.values[b, merged.assignment[b, i]])
    assert not back[merged.assignment < 0].any()


@EVERY
def test_ordered_mergers_have_no_overlap(case: Case) -> None:
    merger = make_case(case, FixedBudget(2.37))
    merged = merger(make_tokens(tokens=30))
    if merger.causality == "global":
        return
    for b, k in enumerate(merged.mask.sum(1).tolist()):
        spans = [(merged.assignment[b] == j).nonzero().flatten() for j in range(k)]
        assert all(left.max() < right.min() for left, right in itertools.pairwise(spans))


@EVERY
@pytest.mark.parametrize("budget", [EntropyBudget(3.0), FixedBudget(3.0)], ids=["entropy", "fixed"])
def test_statistics_are_asked_for_where_they_are_read(
    case: Case, budget: EntropyBudget | FixedBudget
) -> None:
    tokens = make_tokens(tokens=30)
    bare = replace(tokens, attention=None)
    merger = make_case(case, budget).eval()
    asked: list[bool] = []

    def backbone(inputs: dict[str, torch.Tensor], statistics: bool) -> Tokens:
        asked.append(statistics)
        return tokens if statistics else bare

    merged = merger.encode(backbone, {})
    assert torch.equal(merged.assignment, merger(tokens).assignment)
    assert asked == [merger.reads_attention]
    if merger.reads_attention:
        with pytest.raises(UserError, match="attention statistics"):
            merger(bare)
