"""Schedules reach an exact total; two mergings chained are one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merger_cases import CASES, Case, groups, make_case, make_tokens

from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, Schedule
from qm_lightning.merging.chain import chain


def kept(schedule: Schedule, valid: int, final: int, places: int) -> list[int]:
    left = schedule.kept(torch.tensor([valid]), torch.tensor([final]), places)
    return left[:, 0].tolist()


def test_tomes_schedule_with_an_exact_total() -> None:
    # (8, -1) over 12 layers removes 91 of the 96; what rounding left over goes to the first layer.
    left = kept(Schedule(slope=-1.0), 196, 100, 12)
    removed = [a - b for a, b in zip([196, *left], left, strict=False)]
    assert removed == [16 + 5, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    left = kept(Schedule(slope=0.0), 196, 100, 12)
    assert left == [196 - 8 * i for i in range(1, 13)]


def test_dynamicvits_ratios() -> None:
    assert kept(Schedule(shape="geometric"), 196, 67, 3) == [137, 96, 67]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    valid=st.integers(1, 300),
    share=st.floats(0, 1),
    places=st.integers(1, 13),
    slope=st.floats(-1, 1),
    shape=st.sampled_from(["linear", "geometric"]),
)
def test_falls_to_the_total(valid: int, share: float, places: int, slope: float, shape: str) -> None:
    final = max(1, round(share * valid))
    left = kept(Schedule(shape=shape, slope=slope), valid, final, places)  # type: ignore[arg-type]
    assert len(left) == places
    assert left[-1] == final
    assert all(a >= b for a, b in zip([valid, *left], left, strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "steep"}, "linear or geometric"),
        ({"slope": 2.0}, r"\[-1, 1\]"),
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": []}, "ascending"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [[0, 1], [1, 12], None])
def test_layers_that_are_not_there(layers: list[int] | None) -> None:
    with pytest.raises(UserError, match="expected indices from 1"):
        Schedule(layers).places(12 if layers else 1)


@pytest.mark.parametrize("case", [c for c in CASES if c.budgeted], ids=lambda c: c.name)
def test_chained_is_one_merging(case: Case) -> None:
    tokens = make_tokens(seed=4)
    merger = make_case(case, FixedBudget(2.0)).eval()
    first = merger(tokens)
    again = make_tokens(seed=5, tokens=first.mask.shape[1])
    second = merger(
        replace(
            again,
            values=first.values,
            mask=first.mask,
            positions=first.positions,
            size=first.size,
            seeds=tokens.seeds,
        )
    )
    whole = chain(first, second)
    assert whole.anchors is not None
    for b, k in enumerate(second.mask.sum(1).tolist()):
        members = [
            sorted(i for j in part for i in (first.assignment[b] == j).nonzero().flatten().tolist())
            for part in groups(second, b)
        ]
        assert groups(whole, b) == members
        assert torch.equal(whole.size[b, :k], torch.tensor([len(m) for m in members]).to(whole.size.dtype))
        for j, own in enumerate(members):
            assert int(whole.anchors[b, j]) in own
            assert int(whole.ready[b, j]) >= own[-1]
            assert torch.equal(whole.positions[b, j], tokens.positions[b, whole.anchors[b, j]])
    assert torch.equal(whole.counts, tokens.counts)  # type: ignore[arg-type]
    if case.averages:
        share = whole.weights / whole.weights.new_zeros(whole.mask.shape).scatter_add(
            1, whole.assignment.clamp(min=0), whole.weights
        ).gather(1, whole.assignment.clamp(min=0)).clamp(min=1e-12)
        values = tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), 0.0) * share.unsqueeze(-1)
        index = whole.assignment.clamp(min=0).unsqueeze(-1).expand_as(values)
        got = torch.zeros_like(whole.values).scatter_add(1, index, values)
        torch.testing.assert_close(got, whole.values)
