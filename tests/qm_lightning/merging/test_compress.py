"""``QuickMerge.compress`` on what a Hugging Face model hands out, and on what it hands out by mistake."""

import pytest
import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, QuickMerge


def weights(batch: int = 2, tokens: int = 9) -> Tensor:
    return torch.randn(batch, 3, tokens, tokens, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_one_layer_may_come_alone() -> None:
    hidden, budget = torch.randn(2, 9, 4), FixedBudget(3.0)
    alone = QuickMerge.compress(hidden, weights(), budget=budget)
    assert alone.values.shape == (2, 3, 4)
    assert torch.equal(alone.values, QuickMerge.compress(hidden, [weights()], budget=budget).values)


@pytest.mark.parametrize(
    ("hidden", "attention", "mask", "message"),
    [
        (torch.randn(2, 9, 4), None, None, r'attn_implementation="eager" and call it with output_attentions'),
        (torch.randn(2, 9, 4), (), None, "found no attention weights"),
        (torch.randn(2, 9, 4), (None, None), None, "found no attention weights"),
        (torch.randn(2, 5, 4), (weights(),), None, r"\[2, 3, 9, 9\]; expected \[2, heads, 5, 5\]"),
        (torch.randn(9, 4), (weights(),), None, r"hidden_states has shape \[9, 4\]; expected \[B,N,D\]"),
        (torch.randn(2, 9, 4), (weights(),), torch.ones(2, 3), r"mask has shape \[2, 3\]"),
        (torch.randn(2, 9, 4), (weights(),), torch.zeros(2, 9), "have no valid token"),
    ],
)
def test_mistakes_are_named(hidden: Tensor, attention: object, mask: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuickMerge.compress(hidden, attention, mask)  # type: ignore[arg-type]
