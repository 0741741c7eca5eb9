"""attention_with_stats against the materialised fp64 matrix, and the known answers of the spec."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qm_lightning import attention
from qm_lightning.attention import attention_with_stats
from qm_lightning.tokens import AttentionStats

MASKS = ("none", "causal", "padding", "padding_expanded", "full", "per_head", "additive", "minimum", "bias")


def draw(batch: int, heads: int, kv_heads: int, n: int, d: int, d_v: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, d), (batch, kv_heads, n, d), (batch, kv_heads, n, d_v))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make_mask(kind: str, batch: int, heads: int, n: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, n + 1, (batch, 1), generator=generator)
    padding = (torch.arange(n) < lengths)[:, None, None, :]
    eye = torch.eye(n, dtype=torch.bool)
    bias = torch.randn(1, heads, n, n, generator=generator)
    return {
        "none": None,
        "causal": None,
        "padding": padding,
        "padding_expanded": padding.expand(batch, 1, n, n),
        "full": (torch.rand(batch, 1, n, n, generator=generator) > 0.5) | eye,
        "per_head": (torch.rand(batch, heads, n, n, generator=generator) > 0.5) | eye,
        "additive": torch.zeros(batch, 1, 1, n).masked_fill(~padding, -math.inf),
        "minimum": torch.zeros(batch, 1, 1, n).masked_fill(~padding, torch.finfo(torch.float32).min),
        "bias": bias.masked_fill(~padding, torch.finfo(torch.float32).min),
    }[kind]


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, entropy, norm and received from the whole matrix, in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    n = query.shape[2]
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape, dtype=torch.bool)
    if causal:
        visible &= torch.ones(n, n, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        visible &= mask
    elif mask is not None:
        visible &= mask > -1e30
        scores = scores + mask.double()
    scores = scores.masked_fill(~visible, -math.inf)
    matrix = scores.softmax(-1).nan_to_num(0.0)
    entropy = torch.special.entr(matrix).sum(-1)
    count = visible.sum(-1)
    entropy = torch.where(count > 1, entropy / count.clamp(min=2).double().log(), 0.0).mean(1)
    output = matrix @ value
    norm = output.transpose(1, 2).flatten(2).norm(dim=-1)
    is_token = visible.any(dim=2).any(dim=1)
    received = (matrix.mean(1) * is_token[:, :, None]).sum(1)
    return output, entropy, norm, received


def check(
    stats: AttentionStats, entropy: Tensor, norm: Tensor, received: Tensor | None, tolerance: float
) -> None:
    torch.testing.assert_close(stats.entropy[0].double(), entropy, atol=tolerance, rtol=0)
    torch.testing.assert_close(stats.norm[0].double(), norm, atol=tolerance, rtol=tolerance)
    assert ((stats.entropy >= 0) & (stats.entropy <= 1)).all()
    if received is not None:
        assert stats.received is not None
        torch.testing.assert_close(stats.received[0].double(), received, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("received", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_matrix(kind: str, kv_heads: int, received: bool) -> None:
    query, key, value = draw(3, 4, kv_heads, 37, 8, 6)
    mask, causal = make_mask(kind, 3, 4, 37), kind == "causal"
    output, stats = attention_with_stats(
        query, key, value, attn_mask=mask, is_causal=causal, received=received
    )
    expected, entropy, norm, gains = reference(query, key, value, mask, causal)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert (stats.received is None) is not received
    check(stats, entropy, norm, gains if received else None, 1e-5)


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "bias"])
def test_one_query_at_a_time_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = draw(2, 4, 2, 23, 8, 8)
    mask, causal = make_mask(kind, 2, 4, 23), kind == "causal"
    monkeypatch.setattr(attention, "_BLOCK_SCORES_CPU", 1)
    _, stats = attention_with_stats(query, key, value, attn_mask=mask, is_causal=causal, received=True)
    check(stats, *reference(query, key, value, mask, causal)[1:], 1e-5)


@pytest.mark.parametrize("n", [1, 2, 64, 197, 1024])
@pytest.mark.parametrize("causal", [False, True])
def test_fp32_error_and_output_are_those_of_the_kernel(n: int, causal: bool) -> None:
    query, key, value = draw(1, 2, 2, n, 64, 64)
    output, stats = attention_with_stats(query, key, value, is_causal=causal)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, is_causal=causal))
    check(stats, *reference(query, key, value, None, causal)[1:3], None, 1e-5)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 9),
    kind=st.sampled_from(MASKS),
    size=st.floats(0.0, 30.0),
    received=st.booleans(),
    seed=st.integers(0, 999),
)
def test_fp64_is_exact_to_fp64(n: int, d: int, kind: str, size: float, received: bool, seed: int) -> None:
    query, key, value = (x.double() for x in draw(2, 2, 1, n, d, d, seed))
    mask, causal = make_mask(kind, 2, 2, n), kind == "causal"
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    _, stats = attention_with_stats(
        size * query, key, value, attn_mask=mask, is_causal=causal, received=received, scale=0.7
    )
    _, entropy, norm, gains = reference(size * query, key, value, mask, causal, 0.7)
    assert stats.entropy.dtype == torch.float64
    check(stats, entropy, norm, gains if received else None, 1e-10)


@pytest.mark.parametrize("received", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_any_key_are_zero_not_nan(additive: bool, received: bool) -> None:
    query, key, value = draw(2, 2, 2, 9, 8, 8)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False  # left padding: rows 0..3 see nothing
    given_mask = torch.zeros(2, 1, 9, 9).masked_fill(~mask, -math.inf) if additive else mask
    _, stats = attention_with_stats(query, key, value, attn_mask=given_mask, received=received)
    assert stats.entropy.isfinite().all()
    assert (stats.entropy[0, 1, :4] == 0).all()
    assert (stats.norm[0, 1, :4] == 0).all()
    check(stats, *reference(query, key, value, mask, False)[1:3], None, 1e-5)
    if stats.received is not None:
        assert (stats.received[0, 1, :4] == 0).all()
        torch.testing.assert_close(stats.received[0].sum(-1), torch.tensor([9.0, 5.0]))


@pytest.mark.parametrize("received", [False, True])
def test_padding_changes_nothing(received: bool) -> None:
    query, key, value = (x.double() for x in draw(2, 2, 2, 12, 8, 8))
    _, short = attention_with_stats(query[:, :, :7], key[:, :, :7], value[:, :, :7], received=received)
    mask = (torch.arange(12) < 7)[None, None, None, :]
    _, long = attention_with_stats(query, key, value, attn_mask=mask, received=received)
    torch.testing.assert_close(long.entropy[..., :7], short.entropy, atol=1e-13, rtol=0)
    torch.testing.assert_close(long.norm[..., :7], short.norm, atol=1e-13, rtol=0)
    if long.received is not None and short.received is not None:
        torch.testing.assert_close(long.received[..., :7], short.received, atol=1e-13, rtol=0)
        assert (long.received[..., 7:] == 0).all()


def test_known_answers() -> None:
    query, key, value = draw(1, 2, 2, 16, 8, 8)
    _, single = attention_with_stats(query[:, :, :1], key[:, :, :1], value[:, :, :1])
    assert single.entropy.item() == 0.0
    _, equal = attention_with_stats(query, key[:, :, :1].expand_as(key), value)
    torch.testing.assert_close(equal.entropy, torch.ones(1, 1, 16))
    _, equal_causal = attention_with_stats(query, key[:, :, :1].expand_as(key), value, is_causal=True)
    torch.testing.assert_close(equal_causal.entropy[0, 0], torch.tensor([0.0] + [1.0] * 15))
    dominant = torch.zeros_like(key)
    dominant[:, :, 3] = 200.0
    _, peaked = attention_with_stats(torch.ones_like(query), dominant, value, received=True)
    assert peaked.entropy.max() < 1e-5
    assert peaked.received is not None
    torch.testing.assert_close(peaked.received[0, 0, 3], torch.tensor(16.0))


def test_later_tokens_do_not_touch_earlier_rows_when_causal() -> None:
    query, key, value = draw(1, 2, 2, 30, 8, 8)
    _, whole = attention_with_stats(query, key, value, is_causal=True)
    _, prefix = attention_with_stats(query[:, :, :20], key[:, :, :20], value[:, :, :20], is_causal=True)
    torch.testing.assert_close(whole.entropy[..., :20], prefix.entropy, atol=2e-6, rtol=0)


def test_statistics_are_fp32_under_bf16_and_autocast() -> None:
    query, key, value = (x.bfloat16() for x in draw(2, 2, 2, 65, 32, 32))
    output, stats = attention_with_stats(query, key, value)
    assert output.dtype == torch.bfloat16
    assert stats.entropy.dtype == stats.norm.dtype == torch.float32
    entropy = reference(query, key, value, None, False)[1]
    torch.testing.assert_close(stats.entropy[0].double(), entropy, atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cast = attention_with_stats(query.float(), key.float(), value.float())
    torch.testing.assert_close(cast.entropy, stats.entropy, atol=1e-6, rtol=0)


def test_gradients_flow_through_the_output_only() -> None:
    tensors = [x.requires_grad_() for x in draw(2, 4, 2, 11, 8, 8)]
    output, stats = attention_with_stats(*tensors, received=True)
    assert not stats.entropy.requires_grad
    assert not stats.norm.requires_grad
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    query, key, value = tensors
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for ours, theirs in zip(gradients, torch.autograd.grad(plain.square().sum(), tensors), strict=True):
        torch.testing.assert_close(ours, theirs)
