"""Positions are dealt so that every one is trained once, by ranks that agree on the number of batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import DataError
from datamodules.shards.geometry import Geometry, Progress

SIZES = st.tuples(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))


def dealt(total: int, batch: int, world: int, tail: str, start: Progress, numbers: range) -> list[list[int]]:
    """Positions per global batch, over all ranks."""
    ranks = [Geometry(total, batch, r, world, tail) for r in range(world)]
    return [[int(p) for g in ranks for p in g.share(start, t).positions] for t in numbers]


def flat(lists: list[list[int]]) -> list[int]:
    return [x for part in lists for x in part]


@settings(deadline=None, max_examples=100)
@given(SIZES, st.integers(0, 200), st.integers(0, 4))
def test_pad_deals_the_rest_of_an_epoch_once(sizes: tuple[int, int, int], consumed: int, epoch: int) -> None:
    total, batch, world = sizes
    consumed = min(consumed, total)
    geometry = Geometry(total, batch, 0, world)
    steps = range(geometry.remaining(consumed))
    got = dealt(total, batch, world, "pad", Progress(epoch, consumed), steps)
    assert sorted(flat(got)) == list(range(epoch * total + consumed, (epoch + 1) * total))
    if steps:
        ends = [geometry.share(Progress(epoch, consumed), t).end for t in steps]
        assert geometry.progress(Progress(epoch, consumed), ends[-1]) == (epoch, total)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_any_chain_of_geometries_sees_each_sample_once(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    """Stop anywhere, go on with other ranks and batch sizes, until the epoch is done."""
    total, batch, world = sizes
    seen: list[int] = []
    at = Progress(1, 0)
    while at.consumed < total:
        geometry = Geometry(total, batch, 0, world)
        steps = data.draw(st.integers(1, geometry.remaining(at.consumed)))
        seen += flat(dealt(total, batch, world, "pad", at, range(steps)))
        at = geometry.progress(at, geometry.share(at, steps - 1).end)
        batch, world = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    assert sorted(seen) == list(range(total, 2 * total))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_carry_is_one_endless_sequence(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    total, batch, world = sizes
    seen: list[int] = []
    at = Progress(0, 0)
    for _ in range(4):
        geometry = Geometry(total, batch, 0, world, "carry")
        steps = data.draw(st.integers(1, 6))
        got = dealt(total, batch, world, "carry", at, range(steps))
        assert all(len(step) == batch * world for step in got)
        seen += sorted(flat(got))
        at = geometry.progress(at, geometry.share(at, steps - 1).end)
        batch, world = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    assert seen == list(range(len(seen)))


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_tail_weights_make_the_mean_of_ranks_the_mean_of_samples(sizes: tuple[int, int, int]) -> None:
    total, batch, world = sizes
    last = Geometry(total, batch, 0, world).batches - 1
    shares = [Geometry(total, batch, r, world).share(Progress(0, 0), last) for r in range(world)]
    samples = sum(len(s.positions) for s in shares)
    means = [s.positions.mean() if len(s.positions) else 0.0 for s in shares]
    over_ranks = sum(m * s.weight for m, s in zip(means, shares, strict=True)) / world
    assert over_ranks == pytest.approx(sum(float(s.positions.sum()) for s in shares) / samples)


def test_drop_leaves_the_partial_batch() -> None:
    geometry = Geometry(50, 4, 1, 3, "drop")
    assert geometry.batches == 4
    assert geometry.remaining(12) == 3
    assert geometry.share(Progress(0, 0), 3).positions.tolist() == [40, 41, 42, 43]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, 3, "drop"), "leaves no batch"),
        ((10, 0), "batch_size"),
        ((10, 1, 2, 2), "rank"),
        ((10, 1, 0, 1, "wrap"), "tail"),
    ],
)
def test_bad_geometry(arguments: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Geometry(*arguments)
