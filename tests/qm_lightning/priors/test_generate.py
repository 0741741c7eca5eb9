from dataclasses import replace
from typing import Any

import pytest
import torch
from prior_cases import from_parts, make_merged

from qm_lightning.errors import UserError
from qm_lightning.priors import ARPrior
from qm_lightning.priors.sampling import next_token

VOCAB = 11


@pytest.fixture
def prior() -> ARPrior:
    torch.manual_seed(0)
    prior = ARPrior(12, VOCAB, dim=32, depth=2, heads=2).double().eval()
    # Far from uniform, so that greedy choices are no near-ties.
    torch.nn.init.normal_(prior.head.weight, std=1.0)
    return prior


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("coordinates", [1, 2, 3])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_cache_changes_no_token(prior: ARPrior, coordinates: int, temperature: float, top_p: float) -> None:
    merged = make_merged([6, 2, 4], coordinates=coordinates)
    settings = {"max_new_tokens": 12, "temperature": temperature, "top_p": top_p, "eos_id": 3}
    cached = prior.generate(merged, generator=seeded(), **settings)
    whole = prior.generate(merged, generator=seeded(), use_cache=False, **settings)
    assert torch.equal(cached, whole)


def test_temperatures_near_zero_are_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [900.0, -5.0, 0.0]])
    for temperature in (1e-6, 1e-40, 5e-324):
        drawn = next_token(logits, temperature, 1.0, seeded())
        assert drawn.tolist() == [1, 0]


def test_greedy_generation_is_the_teacher_forced_argmax(prior: ARPrior) -> None:
    merged = make_merged([6, 2])
    tokens = prior.generate(merged, 9, temperature=0.0)
    assert tokens.shape == (2, 9)
    assert torch.equal(prior(merged, tokens).logits.argmax(-1), tokens)


def test_rows_do_not_depend_on_each_other(prior: ARPrior) -> None:
    merged = make_merged([6, 2])
    tokens = prior.generate(merged, 9, temperature=0.0)
    for b, count in enumerate([6, 2]):
        parts = (merged.values, merged.mask, merged.size, merged.positions)
        alone = prior.generate(from_parts(*(t[b : b + 1, :count] for t in parts)), 9, temperature=0.0)
        assert torch.equal(alone[0], tokens[b])


def test_finished_rows_are_padded_and_all_finished_stops(prior: ARPrior) -> None:
    merged = make_merged([6, 2, 4, 5])
    free = prior.generate(merged, 12, temperature=0.0)
    eos = int(free[0, 2])
    stopped = prior.generate(merged, 12, temperature=0.0, eos_id=eos)
    for row, full in zip(stopped, free, strict=True):
        where = (full == eos).nonzero().flatten()
        end = int(where[0]) if len(where) else 12
        shown = min(end, stopped.shape[1])
        assert torch.equal(row[:shown], full[:shown])
        assert bool((row[end:] == eos).all())
    one = replace(
        merged, **{n: getattr(merged, n)[:1] for n in ("values", "mask", "size", "positions", "assignment")}
    )
    first = int((free[0] == eos).nonzero()[0])
    assert prior.generate(one, 12, temperature=0.0, eos_id=eos).shape == (1, first + 1)


def test_stream_gives_the_same_tokens_one_by_one(prior: ARPrior) -> None:
    merged = make_merged([6, 2])
    stream = prior.stream(merged, 5, generator=seeded(4))
    first = next(stream)
    assert first.shape == (2,)
    rest = torch.stack([first, *stream], dim=1)
    assert torch.equal(rest, prior.generate(merged, 5, generator=seeded(4)))


def test_seed_decides(prior: ARPrior) -> None:
    merged = make_merged([6, 2])
    a, b, c = (prior.generate(merged, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_cache_bytes_fall_by_the_compression(prior: ARPrior) -> None:
    long, short = prior.trunk.new_cache(2, 2048), prior.trunk.new_cache(2, 1024)
    assert long.nbytes == 2 * short.nbytes
    assert (
        short.nbytes == 2 * 2 * 2 * 2 * 1024 * 16 * 8
    )  # keys and values, layers, samples, heads, tokens, d, fp64


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(40_000, 4)
    for temperature in (0.5, 1.0, 2.0):
        drawn = next_token(logits, temperature, 1.0, seeded())
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.01)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]]).log().expand(4000, 4)
    assert set(next_token(logits, 1.0, 0.5, seeded()).tolist()) == {1}
    assert set(next_token(logits, 1.0, 0.51, seeded()).tolist()) == {1, 2}
    assert set(next_token(logits, 1.0, 0.94, seeded()).tolist()) == {0, 1, 2}
    assert set(next_token(logits, 1.0, 1e-9, seeded()).tolist()) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5; expected 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_settings_are_refused(prior: ARPrior, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prior.generate(make_merged([3]), **{"max_new_tokens": 4, **settings})


def test_not_finite_logits_are_refused(prior: ARPrior) -> None:
    merged = make_merged([3])
    broken = replace(merged, values=merged.values * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        prior.generate(broken, 4)


def test_empty_prompt_is_refused(prior: ARPrior) -> None:
    merged = make_merged([3, 2])
    empty = replace(merged, mask=merged.mask & torch.tensor([[True], [False]]))
    with pytest.raises(UserError, match="prompt of a sample is empty"):
        prior.generate(empty, 4)
