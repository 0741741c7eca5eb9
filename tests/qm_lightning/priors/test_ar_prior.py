from dataclasses import replace

import pytest
import torch
from prior_cases import from_parts, make_merged
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qm_lightning.errors import UserError
from qm_lightning.priors import ARPrior

WIDTH, VOCAB = 12, 11
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def prior() -> ARPrior:
    torch.manual_seed(0)
    return ARPrior(WIDTH, VOCAB, dim=32, depth=2, heads=2).double()


def make_targets(lengths: list[int], padding: int = 0, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, VOCAB, (len(lengths), max(lengths) + padding), generator=draw)
    for b, length in enumerate(lengths):
        targets[b, length:] = -100
    return targets


@pytest.mark.parametrize("coordinates", [1, 2, 3])
def test_shapes_for_every_modality_with_one_prior(prior: ARPrior, coordinates: int) -> None:
    output = prior(make_merged([5, 3], coordinates=coordinates), make_targets([4, 2]))
    assert output.logits.shape == (2, 4, VOCAB)
    assert output.forward_prediction.shape == output.backward_prediction.shape == (2, 5, WIDTH)


@pytest.mark.parametrize("padding", [1, 6])
def test_padding_and_other_samples_change_nothing(prior: ARPrior, padding: int) -> None:
    counts, lengths = [5, 3, 7], [4, 2, 1]
    targets = make_targets(lengths)
    merged = make_merged(counts, coordinates=2)
    padded = make_merged(counts, coordinates=2, padding=padding)
    junk = replace(
        padded,
        values=torch.where(padded.mask[..., None], padded.values, 1e3),
        positions=torch.where(padded.mask[..., None], padded.positions, 77),
    )
    together = prior(merged, targets)
    wide = prior(junk, torch.nn.functional.pad(targets, (0, 3), value=-100))
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        cut = from_parts(
            *(t[b : b + 1, :count] for t in (merged.values, merged.mask, merged.size, merged.positions))
        )
        alone = prior(cut, targets[b : b + 1, :length])
        for output in (together, wide):
            torch.testing.assert_close(output.logits[b, :length], alone.logits[0], **CLOSE)
            for name in ("forward_prediction", "backward_prediction"):
                got, want = getattr(output, name)[b, :count], getattr(alone, name)[0]
                torch.testing.assert_close(got, want, **CLOSE)


def test_padded_content_changes_no_bit(prior: ARPrior) -> None:
    merged, targets = make_merged([5, 3], padding=2), make_targets([4, 2])
    junk = replace(merged, values=torch.where(merged.mask[..., None], merged.values, 1e3))
    other = targets.clone()
    a, b = prior(merged, targets), prior(junk, other)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.backward_prediction[merged.mask], b.backward_prediction[merged.mask])


@pytest.mark.parametrize("changed", range(5))
def test_targets_after_t_do_not_reach_logit_t(prior: ARPrior, changed: int) -> None:
    merged, targets = make_merged([6]), make_targets([5])
    other = targets.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    before, after = prior(merged, targets).logits, prior(merged, other).logits
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    if changed < 4:
        assert not torch.allclose(before[:, changed + 1], after[:, changed + 1])


@pytest.mark.parametrize("changed", [0, 2, 5])
def test_alignment_sees_one_direction_only(prior: ARPrior, changed: int) -> None:
    merged, targets = make_merged([6]), make_targets([5])
    values = merged.values.clone()
    values[0, changed] = values[0, changed].roll(1)
    a, b = prior(merged, targets), prior(replace(merged, values=values), targets)
    moved = (a.forward_prediction - b.forward_prediction).abs().amax(-1)[0] > 1e-9
    assert moved.tolist() == [k >= changed for k in range(6)]
    moved = (a.backward_prediction - b.backward_prediction).abs().amax(-1)[0] > 1e-9
    assert moved.tolist() == [k <= changed for k in range(6)]


def test_size_and_coordinates_are_read(prior: ARPrior) -> None:
    merged, targets = make_merged([6], coordinates=2), make_targets([5])
    logits = prior(merged, targets).logits
    assert not torch.allclose(prior(replace(merged, size=merged.size.flip(1)), targets).logits, logits)
    moved = replace(merged, positions=merged.positions.flip(2))
    assert not torch.allclose(prior(moved, targets).logits, logits)


def test_targets_stand_behind_the_input_and_not_behind_the_last_anchor(prior: ARPrior) -> None:
    merged, targets = make_merged([5, 3], coordinates=2), torch.tensor([[1, 2], [3, 4]])
    own = merged.positions.amax(-1).masked_fill(~merged.mask, -1).amax(1) + 1
    logits = prior(merged, targets).logits
    assert torch.equal(prior(replace(merged, end=own), targets).logits, logits)
    further = prior(replace(merged, end=own + 3), targets).logits
    assert not torch.allclose(further, logits)
    # Places are relative: the same input somewhere else reads alike.
    moved = replace(merged, positions=merged.positions + 7, end=own + 10)
    moved = replace(moved, positions=F.pad(moved.positions, (1, 0), value=7))
    there = replace(merged, positions=F.pad(merged.positions, (1, 0)), end=own + 3)
    torch.testing.assert_close(
        prior(moved, targets).logits, prior(there, targets).logits, rtol=0.0, atol=1e-10
    )


def test_alignment_is_computed_only_when_asked(prior: ARPrior) -> None:
    merged, targets = make_merged([6]), make_targets([5])
    asked, not_asked = prior(merged, targets), prior(merged, targets, align=False)
    assert not_asked.forward_prediction is None
    assert not_asked.backward_prediction is None
    assert torch.equal(asked.logits, not_asked.logits)
    assert (
        ARPrior(WIDTH, VOCAB, dim=32, depth=1, heads=2, align=False)
        .double()(merged, targets)
        .forward_prediction
        is None
    )


def test_gradients_reach_every_parameter_and_the_merged_tokens(prior: ARPrior) -> None:
    merged = make_merged([6, 4])
    merged = replace(merged, values=merged.values.requires_grad_())
    output = prior(merged, make_targets([5, 3]))
    aligned = output.forward_prediction[merged.mask].sum() + output.backward_prediction[merged.mask].sum()
    (output.logits.logsumexp(-1).sum() + aligned).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (merged.values.grad.abs().sum(-1) > 0).equal(merged.mask)


def test_it_learns_to_read_its_context() -> None:
    torch.manual_seed(0)
    prior = ARPrior(8, 6, dim=32, depth=1, heads=2, align=False)
    code = torch.randn(6, 8)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(150):
        targets = torch.randint(0, 6, (32, 3))
        merged = make_merged([3] * 32, width=8)
        merged = replace(merged, values=code[targets], size=merged.size.float())
        loss = torch.nn.functional.cross_entropy(
            prior(merged, targets).logits.flatten(0, 1), targets.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # log 6 = 1.79 without the context


@pytest.mark.parametrize(("K", "T"), [(1, 1), (7, 4), (30, 9)])
def test_flops_are_those_of_the_counter(prior: ARPrior, K: int, T: int) -> None:
    prior = prior.to("meta")
    merged = make_merged([K])
    merged = from_parts(*(t.to("meta") for t in (merged.values, merged.mask, merged.size, merged.positions)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        prior(merged, torch.zeros(1, T, dtype=torch.long, device="meta"), align=False)
    assert prior.flops(K, T) == counter.get_total_flops()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size=0"):
        ARPrior(8, 0)
