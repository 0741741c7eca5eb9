import pytest
import torch
from torch import Tensor

from qm_lightning.priors.rope import rotary_tables, rotate, to_three_axes

BASE = 10_000.0
NOTHING = torch.zeros(0, dtype=torch.float64)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = rotary_tables(positions, x.shape[-1] // 2, BASE, torch.float64)
    return rotate(x, cos, sin, NOTHING)


def test_every_modality_gets_three_axes() -> None:
    text, image, video = torch.tensor([[[7]]]), torch.tensor([[[2, 3]]]), torch.tensor([[[4, 5, 6]]])
    assert to_three_axes(text).tolist() == [[[7, 7, 7]]]
    assert to_three_axes(image).tolist() == [[[0, 2, 3]]]
    assert to_three_axes(video).tolist() == [[[4, 5, 6]]]
    with pytest.raises(ValueError, match="4 coordinates"):
        to_three_axes(torch.zeros(1, 1, 4, dtype=torch.long))


def test_text_is_plain_rope() -> None:
    x = torch.randn(2, 3, 5, 14, dtype=torch.float64)
    index = torch.randint(0, 5000, (2, 5))
    got = turned(x, to_three_axes(index.unsqueeze(-1)))
    frequencies = BASE ** (-torch.arange(7, dtype=torch.float64) / 7)
    rotation = torch.polar(torch.ones(2, 1, 5, 7, dtype=torch.float64), index[:, None, :, None] * frequencies)
    want = torch.complex(x[..., :7], x[..., 7:]) * rotation
    torch.testing.assert_close(got, torch.cat([want.real, want.imag], dim=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_turns_every_third_frequency_only(axis: int) -> None:
    x = torch.randn(1, 1, 1, 14, dtype=torch.float64)
    here = torch.tensor([[[3, 4, 5]]])
    there = here.clone()
    there[..., axis] += 2
    moved = (turned(x, here) - turned(x, there)).abs().reshape(2, 7).sum(0) > 1e-12
    assert moved.tolist() == [i % 3 == axis for i in range(7)]


def test_scores_depend_on_distances_only() -> None:
    query, key = torch.randn(2, 1, 2, 6, 14, dtype=torch.float64).unbind(0)
    positions = torch.randint(0, 50, (1, 6, 3))
    near = turned(query, positions) @ turned(key, positions).mT
    far = turned(query, positions + 1000) @ turned(key, positions + 1000).mT
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)
