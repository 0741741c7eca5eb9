import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.losses import (
    alignment_losses,
    collapse_variance,
    fidelity_loss,
    global_mean,
    relative_error,
    target_loss,
)
from qm_lightning.priors import PriorOutput
from qm_lightning.tokens import MergedTokens, Tokens

VALID = torch.tensor([True, True, False])


def merge_pairs(values: Tensor, mask: Tensor) -> MergedTokens:
    """Neighbours 2i, 2i+1 are averaged; the slow way, over valid tokens."""
    B, N, D = values.shape
    assignment = (torch.arange(N) // 2).expand(B, N).masked_fill(~mask, -1)
    merged = torch.zeros(B, N // 2, D, dtype=values.dtype)
    for b in range(B):
        for k in range(N // 2):
            members = values[b, assignment[b] == k]
            if len(members):
                merged[b, k] = members.mean(0)
    size = F.one_hot(assignment.clamp(min=0), N // 2).mul(mask[..., None]).sum(1).to(values.dtype)
    place = torch.zeros(B, N // 2, 1, dtype=torch.long)
    return MergedTokens(merged, size > 0, size, place, place[..., 0], assignment, mask.to(values.dtype))


@pytest.fixture
def case() -> tuple[Tokens, MergedTokens]:
    torch.manual_seed(0)
    values = torch.randn(3, 8, 5, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([8, 5, 6])[:, None]
    tokens = Tokens(values, mask, torch.arange(8)[None, :, None].expand(3, 8, 1))
    return tokens, merge_pairs(values, mask)


def test_target_loss_sums_valid_target_tokens() -> None:
    logits = torch.randn(3, 4, 6, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2, 3], [4, 5, -100, -100], [1, 1, 1, 1]])
    total, count = target_loss(logits, targets, VALID)
    log_p = logits.log_softmax(-1)
    want = -sum(log_p[b, t, targets[b, t]] for b, n in ((0, 4), (1, 2)) for t in range(n))
    torch.testing.assert_close(total, want)
    assert int(count) == 6


def test_target_loss_is_computed_in_fp32() -> None:
    logits = torch.zeros(1, 300, 1000, dtype=torch.bfloat16)
    total, count = target_loss(logits, torch.zeros(1, 300, dtype=torch.long), torch.tensor([True]))
    assert float(total / count) == pytest.approx(math.log(1000), rel=1e-6)


def test_alignment_of_perfect_predictions_is_zero(case: tuple[Tokens, MergedTokens]) -> None:
    _, merged = case
    target = F.layer_norm(merged.values, (5,))
    output = PriorOutput(merged.values, target.roll(-1, 1), target.roll(1, 1))
    for total, count in alignment_losses(output, merged, VALID):
        assert float(total) == pytest.approx(0.0, abs=1e-20)
        assert int(count) == 3 + 2  # 4 tokens and 3 tokens; the padding sample has none


def test_alignment_against_a_loop(case: tuple[Tokens, MergedTokens]) -> None:
    _, merged = case
    forward, backward = torch.randn(2, *merged.values.shape, dtype=torch.float64)
    got = alignment_losses(PriorOutput(merged.values, forward, backward), merged, VALID)
    target = F.layer_norm(merged.values, (5,))
    pairs = [(b, k) for b, K in ((0, 4), (1, 3)) for k in range(K - 1)]
    torch.testing.assert_close(
        got[0][0], sum(F.smooth_l1_loss(forward[b, k], target[b, k + 1]) for b, k in pairs)
    )
    torch.testing.assert_close(
        got[1][0], sum(F.smooth_l1_loss(backward[b, k + 1], target[b, k]) for b, k in pairs)
    )


def test_alignment_sends_no_gradient_to_what_it_predicts(case: tuple[Tokens, MergedTokens]) -> None:
    _, merged = case
    merged = replace(merged, values=merged.values.clone().requires_grad_())
    prediction = torch.randn_like(merged.values, requires_grad=True)
    (forward, _), (backward, _) = alignment_losses(
        PriorOutput(prediction, prediction, prediction), merged, VALID
    )
    (forward + backward).backward()
    assert merged.values.grad is None
    assert prediction.grad.abs().sum() > 0


def test_alignment_without_predictions_is_zero(case: tuple[Tokens, MergedTokens]) -> None:
    _, merged = case
    for total, count in alignment_losses(PriorOutput(merged.values), merged, VALID):
        assert float(global_mean(total, count)) == 0.0


def test_relative_error_by_hand() -> None:
    values = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    tokens = Tokens(values, mask, torch.zeros(1, 3, 1, dtype=torch.long))
    one = torch.ones(1, 1, dtype=torch.bool)
    index = torch.zeros(1, 1, dtype=torch.long)
    merged = MergedTokens(
        torch.tensor([[[2.0, 0.0]]]),
        one,
        one * 2.0,
        index[..., None],
        index,
        torch.tensor([[0, 0, -1]]),
        mask.float(),
    )
    # (1 + 1) / (9 + 1)
    assert relative_error(tokens, merged).tolist() == pytest.approx([0.2])
    total, count = fidelity_loss(tokens, merged, 0.8, torch.tensor([True]))
    assert (float(total), int(count)) == (pytest.approx(0.2 - 0.04), 1)
    dropped = replace(merged, assignment=torch.tensor([[0, -1, -1]]))
    # Token 0 is 1 away, token 1 is lost.
    assert relative_error(tokens, dropped).tolist() == pytest.approx([0.2])


def test_fidelity_is_idle_above_gamma_and_skips_padding_samples(case: tuple[Tokens, MergedTokens]) -> None:
    tokens, merged = case
    total, count = fidelity_loss(tokens, merged, 0.8, VALID)
    want = (relative_error(tokens, merged)[:2] - 0.04).relu().sum()
    torch.testing.assert_close(total, want)
    assert int(count) == 2
    assert float(fidelity_loss(tokens, merged, 0.0, VALID)[0]) == 0.0  # nothing must survive


def test_fidelity_pulls_merged_tokens_towards_their_members(case: tuple[Tokens, MergedTokens]) -> None:
    tokens, merged = case
    merged = replace(merged, values=torch.zeros_like(merged.values).requires_grad_())
    fidelity_loss(tokens, merged, 0.8, VALID)[0].backward()
    mean = merge_pairs(tokens.values, tokens.mask).values
    assert float((merged.values.grad[:2] * mean[:2]).sum()) < 0
    assert merged.values.grad[2].abs().sum() == 0


def test_collapse_variance(case: tuple[Tokens, MergedTokens]) -> None:
    _, merged = case
    sample = [merged.values[0].float(), merged.values[1, :3].float()]
    squares = sum((x - x.mean(0)).square().sum(0) for x in sample)
    torch.testing.assert_close(collapse_variance(merged, VALID), (squares / 5).mean())
    constant = replace(merged, values=torch.ones_like(merged.values) * torch.randn(3, 1, 5))
    assert float(collapse_variance(constant, VALID)) == pytest.approx(0.0, abs=1e-12)


def test_global_mean_of_nothing_is_zero_with_gradient() -> None:
    total = torch.zeros((), requires_grad=True)
    mean = global_mean(total, torch.zeros((), dtype=torch.long))
    mean.backward()
    assert float(mean.detach()) == 0.0
    assert float(total.grad) == 1.0
