"""The seven tests of generative.md, section 6, for every streaming merger; cheats must trip them."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from streaming_cases import CHEATS, MERGERS, Model, texts

from qm_lightning.merging import FixedStride, NoMerge
from qm_lightning.priors.growing import GrowingText

CLOSE = {"rtol": 0.0, "atol": 1e-11}
VOCAB = 5


@torch.no_grad()
def prefix_error(model: Model) -> float:
    ids = texts(VOCAB, 4, 14)
    full = model.logits(ids)
    errors = [(model.logits(ids[:, :t]) - full[:, :t]).abs().max() for t in (1, 2, 3, 5, 8, 13)]
    return float(max(errors))


@torch.no_grad()
def future_error(model: Model) -> float:
    ids = texts(VOCAB, 4, 14)
    full, error = model.logits(ids), 0.0
    for t in range(13):
        other = ids.clone()
        other[:, t + 1 :] = texts(VOCAB, 4, 13 - t, seed=t + 1)
        error = max(error, float((model.logits(other)[:, : t + 2] - full[:, : t + 2]).abs().max()))
    return error


@torch.no_grad()
def mass_error(model: Model, length: int = 5) -> float:
    """Of the probabilities of all strings."""
    strings = torch.tensor(list(itertools.product(range(model.vocab), repeat=length)))
    return abs(float(model.log_likelihood(strings).sum(1).exp().sum()) - 1.0)


@pytest.fixture(params=MERGERS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param, VOCAB)


def test_the_cases_merge_something_and_not_everything(model: Model) -> None:
    merged = model.encode(texts(VOCAB, 16, 14))
    if not isinstance(model.merger, NoMerge):
        assert 1.2 < float(merged.compression.mean()) < 5.0
        same = bool((merged.assignment == merged.assignment[:1]).all())
        assert same == isinstance(model.merger, FixedStride)
    logits = model.logits(texts(VOCAB, 16, 14))
    start = model.prior.start.clone()
    model.prior.start.copy_(start.flip(0))
    moved = (model.logits(texts(VOCAB, 16, 14)) - logits).abs().amax((0, 2))
    model.prior.start.copy_(start)
    assert (moved > 1e-6).all()  # every row reads the global transformer


def test_1_prefixes_are_scored_alike(model: Model) -> None:
    assert prefix_error(model) < 1e-11


def test_2_the_future_changes_nothing(model: Model) -> None:
    assert future_error(model) == 0.0


def test_2_merged_tokens_that_are_ready_do_not_change(model: Model) -> None:
    ids = texts(VOCAB, 6, 14)
    full = model.encode(ids)
    for cut in range(1, 14):
        other = ids.clone()
        other[:, cut:] = texts(VOCAB, 6, 14 - cut, seed=cut)
        merged = model.encode(other)
        for b in range(6):
            known = [(m.mask[b] & (m.ready[b] < cut)).nonzero().flatten() for m in (full, merged)]
            assert torch.equal(*known)
            for name in ("values", "size", "positions", "ready"):
                assert torch.equal(getattr(full, name)[b, known[0]], getattr(merged, name)[b, known[0]]), name


@pytest.mark.parametrize(("vocab", "length"), [(2, 5), (3, 5)])
@pytest.mark.parametrize("name", MERGERS)
def test_3_probabilities_of_all_strings_sum_to_one(name: str, vocab: int, length: int) -> None:
    assert mass_error(Model(name, vocab), length) < 1e-9


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_trip_tests_1_to_3(name: str) -> None:
    model = Model(name, VOCAB)
    # A span offered too early holds the token to be predicted, but no later one: prefixes agree.
    assert name == "early" or prefix_error(model) > 1e-4
    assert future_error(model) > 1e-4
    assert mass_error(Model(name, 3)) > 1e-6


def nats_of_uniform_tokens(name: str, steps: int = 60) -> float:
    """Validation loss after training on tokens that nothing can tell."""
    torch.manual_seed(0)
    model = Model(name, 4).float()
    model.backbone.double()
    model.train()
    model.prior.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids = texts(4, 32, 16, seed=step)
        merged = model.encode(ids)
        loss = -model.prior(merged, ids).log_likelihood(ids).mean() + sum(merged.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return -float(model.log_likelihood(texts(4, 512, 16, seed=10_000)).mean())


@pytest.mark.parametrize("name", MERGERS)
def test_4_uniform_tokens_cannot_be_guessed(name: str) -> None:
    assert math.log(4) - 0.01 <= nats_of_uniform_tokens(name) < math.log(4) + 0.1


def test_4_a_leak_is_found_in_the_same_steps() -> None:
    assert nats_of_uniform_tokens("early") < math.log(4) - 0.05


def test_5_batch_and_padding_change_nothing(model: Model) -> None:
    ids = texts(VOCAB, 3, 12)
    lengths = [12, 5, 8]
    mask = torch.arange(15) < torch.tensor(lengths)[:, None]
    padded = torch.nn.functional.pad(ids, (0, 3), value=3)
    together = model.logits(padded, mask)
    for b, length in enumerate(lengths):
        alone = model.logits(ids[b : b + 1, :length])
        torch.testing.assert_close(together[b, :length], alone[0], **CLOSE)


def test_5_padded_ids_change_no_bit(model: Model) -> None:
    mask = torch.arange(12) < torch.tensor([12, 5, 8])[:, None]
    one, other = texts(VOCAB, 3, 12), texts(VOCAB, 3, 12, seed=1)
    other = torch.where(mask, one, other)
    assert torch.equal(model.logits(one, mask)[mask], model.logits(other, mask)[mask])


def test_7_step_by_step_equals_teacher_forced(model: Model) -> None:
    prompts = texts(VOCAB, 3, 6)
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths[:, None]
    written = model.prior.generate(
        model.encode, prompts, mask, 12, generator=torch.Generator().manual_seed(0)
    )
    for b, length in enumerate(lengths.tolist()):
        text = torch.cat([prompts[b : b + 1, :length], written[b : b + 1]], dim=1)
        alone = model.prior.generate(
            model.encode, text[:, :length], torch.ones(1, length, dtype=torch.bool), 12, temperature=0.0
        )
        greedy = torch.cat([text[:, :length], alone], dim=1)
        assert torch.equal(model.logits(greedy)[:, length:].argmax(-1), alone)


def test_7_step_by_step_logits_and_boundaries(model: Model) -> None:
    ids = texts(VOCAB, 3, 18)
    lengths = torch.tensor([5, 1, 3])
    mask = torch.arange(5) < lengths[:, None]
    with torch.no_grad():
        text = GrowingText(model.prior, model.encode, ids[:, :5], mask, room=12)
        forced = model.logits(ids)
        rows = torch.arange(3)
        for step in range(12):
            torch.testing.assert_close(text.logits(), forced[rows, lengths + step], **CLOSE)
            text.append(ids[rows, lengths + step])
    scored = model.encode(text.ids[:, :17], torch.arange(17) < (lengths + 12)[:, None])
    for field in fields(scored):
        if isinstance(getattr(scored, field.name), torch.Tensor):
            assert torch.equal(getattr(scored, field.name), getattr(text.merged, field.name)), field.name
    # One entry per ready merged token and the start vector, not one per token.
    ready = (scored.mask & (scored.ready < (lengths + 12)[:, None])).sum(1)
    assert torch.equal(text.cache.lengths, ready + 1)
