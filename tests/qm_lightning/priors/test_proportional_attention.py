from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qm_lightning.errors import UserError
from qm_lightning.priors.rope import rotary_tables, rotate
from qm_lightning.priors.transformer import CausalAttention, CausalTransformer, bias_channels, key_bias

DIM, HEADS = 32, 2


def reference(attention: CausalAttention, x: Tensor, positions: Tensor, size: Tensor, mask: Tensor) -> Tensor:
    """Explicit scores with an additive mask."""
    query, key, value = attention.project_in(x).split(attention.split, dim=-1)
    query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    tables = rotary_tables(positions, attention.content // 2, 10_000.0, torch.float64)
    nothing = torch.zeros(0, dtype=x.dtype)
    query, key = rotate(query, *tables, nothing), rotate(key, *tables, nothing)
    scores = query @ key.mT / attention.content**0.5 + size.clamp(min=1e-9).log()[:, None, None]
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & mask[:, None, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return attention.project_out((weights @ value).transpose(1, 2).flatten(2))


def inputs(B: int = 3, S: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(B, S, DIM, dtype=torch.float64)
    positions = torch.randint(0, 20, (B, S, 3))
    size = torch.randint(1, 40, (B, S)).double()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:7] = False
    mask[2, 1:] = False
    return x, positions, size * mask, mask


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_bias_channels_equal_an_additive_mask(backend: SDPBackend) -> None:
    torch.manual_seed(0)
    attention = CausalAttention(DIM, HEADS).double()
    x, positions, size, mask = inputs()
    tables = rotary_tables(positions, attention.content // 2, 10_000.0, torch.float64)
    with sdpa_kernel(backend):
        got = attention(x, tables, key_bias(size, mask), None, 0)
    want = reference(attention, x, positions, size, mask)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-12, atol=1e-12)


def test_a_key_of_size_two_is_two_equal_keys() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    positions = torch.arange(5)[None, :, None].expand(1, 5, 3)
    twice = torch.tensor([0, 1, 1, 2, 3, 4])
    size = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0]]).double()
    real = torch.ones(1, 6, dtype=torch.bool)
    # One layer: in the next, the first copy's own row would differ, as it does not see the second.
    single = CausalTransformer(DIM, 1, HEADS).double()
    merged = single(x, positions, key_bias(size, real[:, :5]))
    doubled = single(x[:, twice], positions[:, twice], key_bias(torch.ones(1, 6).double(), real))
    torch.testing.assert_close(merged[:, 2:], doubled[:, 3:], rtol=1e-12, atol=1e-12)


def test_two_bf16_channels_hold_a_bias_that_one_cannot() -> None:
    bias = torch.arange(1, 5000, 7).float().log()[None]
    one = (bias.bfloat16().float() - bias).abs().max()
    two = (bias_channels(bias, torch.bfloat16).float().sum(-1)[:, 0] - bias).abs().max()
    assert one > 1e-2
    assert two < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padded_keys_weigh_nothing_in_narrow_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = CausalAttention(DIM, HEADS).to(dtype)
    x, positions, size, mask = inputs()
    tables = rotary_tables(positions, attention.content // 2, 10_000.0, dtype)
    bias = key_bias(size.float(), mask)
    x = x.to(dtype)
    other = torch.where(mask[..., None], x, torch.randn_like(x) * 9)
    assert torch.equal(
        attention(x, tables, bias, None, 0)[mask], attention(other, tables, bias, None, 0)[mask]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 32, "depth": 0, "heads": 2}, "depth=0"),
        ({"dim": 30, "depth": 1, "heads": 4}, "7.5 channels a head"),
        ({"dim": 12, "depth": 1, "heads": 2}, "6 channels a head"),
        ({"dim": 18, "depth": 1, "heads": 2}, "9 channels a head"),
        ({"dim": 32, "depth": 1, "heads": 2, "dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CausalTransformer(**arguments)
