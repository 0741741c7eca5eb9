"""Labels as next tokens: the mask, independence of labels, and truncation (generative.md, section 2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prior_cases import make_merged
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.priors import ARPrior, LabelPrior, keep_first_blocks, label_layout, prefix_label_mask

SEP = 6


def make_prior(variant: str = "strict", depth: int = 2, prompt: tuple[int, ...] = (5,)) -> LabelPrior:
    torch.manual_seed(0)
    prior = LabelPrior(12, 7, variant=variant, prompt=prompt, dim=32, depth=depth, heads=2)  # type: ignore[arg-type]
    torch.nn.init.normal_(prior.head.weight, std=0.5)
    return prior.double().eval()


def rows(*labels: list[list[int]]) -> Tensor:
    flat = [[token for label in sample for token in (*label, SEP)] for sample in labels]
    width = max(map(len, flat))
    return torch.tensor([row + [-100] * (width - len(row)) for row in flat])


def label_scores(prior: LabelPrior, labels: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of each label's tokens, in one packed pass."""
    targets = rows(labels)
    scores = prior(make_merged([5]), targets).log_likelihood(targets)[0]
    return list(scores.split([len(label) + 1 for label in labels]))


def test_mask_by_hand() -> None:
    sep = 99
    # two visual tokens, then <image> BOS The are, then labels (10, 11, SEP) and (12, SEP)
    mask = prefix_label_mask(2, 4, torch.tensor([[10, 11, sep, 12, sep]]), sep)[0]
    attended = [row.nonzero().flatten().tolist() for row in mask]
    assert attended[:2] == [[0, 1], [0, 1]]
    assert attended[2] == [0, 1, 2]
    assert attended[5] == [0, 1, 2, 3, 4, 5]
    assert attended[6:9] == [[*range(6), 6], [*range(6), 6, 7], [*range(6), 6, 7, 8]]
    assert attended[9] == [*range(6), 9]
    assert attended[10] == [*range(6), 9, 10]


def test_repo_mask_blinds_the_label_without_sep() -> None:
    mask = prefix_label_mask(2, 1, torch.tensor([[1, SEP, 2, 3, -100]]), SEP, "repo")[0]
    attended = [row.nonzero().flatten().tolist() for row in mask]
    assert attended[3:5] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert attended[5:] == [[0, 1, 2]] * 3


def test_layout() -> None:
    layout = label_layout(torch.tensor([[1, 2, SEP, SEP, 4, -100]]), SEP)
    assert layout.block[0, :5].tolist() == [0, 0, 0, 1, 2]
    assert layout.offset[0, :5].tolist() == [0, 1, 2, 0, 0]
    assert layout.closed[0, :5].tolist() == [True] * 4 + [False]
    assert label_layout(torch.empty(2, 0, dtype=torch.long), SEP).block.shape == (2, 0)


def test_order_of_labels_means_nothing_and_packed_equals_separate() -> None:
    prior = make_prior()
    labels = [[1, 2], [3], [1, 4, 4]]
    packed = label_scores(prior, labels)
    permuted = label_scores(prior, [labels[i] for i in (2, 0, 1)])
    for i, at in ((0, 1), (1, 2), (2, 0)):
        torch.testing.assert_close(packed[i], permuted[at], atol=1e-12, rtol=0)
    for label, scores in zip(labels, packed, strict=True):
        torch.testing.assert_close(label_scores(prior, [label])[0], scores, atol=1e-12, rtol=0)


def test_order_means_something_to_the_repo_variant() -> None:
    prior = make_prior("repo")
    labels = [[1, 2], [3], [4]]
    there, back = label_scores(prior, labels), label_scores(prior, [labels[i] for i in (1, 0, 2)])
    assert (there[1][0] - back[0][0]).abs() > 1e-3  # label 2's first token moved to the anchor
    # The last SEP is not learnt, the tokens before it are.
    targets = rows([[1, 2], [3]], [[1], [2]])
    learnt = prior.learnt(targets)
    assert learnt.tolist() == [[1, 2, SEP, 3, -100], [1, SEP, 2, -100, -100]]
    assert make_prior().learnt(targets) is targets


def test_labels_do_not_see_each_other_and_the_prefix_sees_both_ways() -> None:
    prior = make_prior()
    merged = make_merged([5])
    targets = rows([[1, 2], [3, 4]])
    before = prior(merged, targets).logits
    other = rows([[5, 0], [3, 4]])
    after = prior(merged, other).logits
    torch.testing.assert_close(before[:, 3:], after[:, 3:], atol=0, rtol=0)
    torch.testing.assert_close(before[:, 0], after[:, 0], atol=0, rtol=0)
    assert (before[:, 1:3] - after[:, 1:3]).abs().max() > 1e-3

    def states(values: Tensor) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        hook = prior.trunk.register_forward_hook(lambda *call: hidden.append(call[2]))
        logits = prior(replace(merged, values=values), targets).logits
        hook.remove()
        return hidden[0], logits

    moved = merged.values.clone()
    moved[0, 4, :3] += 2.0
    (old, old_logits), (new, new_logits) = states(merged.values), states(moved)
    assert (old[0, 0] - new[0, 0]).abs().max() > 1e-3
    assert ((old_logits - new_logits).abs().amax(dim=-1) > 1e-4).all()


def test_padding_and_batch_change_nothing() -> None:
    prior = make_prior()
    alone = prior(make_merged([3]), rows([[1], [2]])).logits
    crowd = prior(make_merged([3, 6], padding=2), rows([[1], [2]], [[1, 2, 3], [4], [0]])).logits
    torch.testing.assert_close(alone[0], crowd[0, :4], atol=1e-12, rtol=0)


def test_gradients_are_finite() -> None:
    prior = make_prior().train()
    targets = rows([[1, 2], [3]], [[4]])
    (-prior(make_merged([3, 4], padding=1), targets).log_likelihood(targets).sum()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in prior.parameters())
    assert prior.head.weight.grad is not None


def test_truncation_keeps_the_first_blocks() -> None:
    deep, shallow = make_prior(depth=3), make_prior(depth=1)
    torch.nn.init.zeros_(shallow.head.weight)
    shallow.load_state_dict(keep_first_blocks(deep.state_dict(), shallow))
    deep.trunk.blocks = deep.trunk.blocks[:1]
    targets = rows([[1, 2], [3]])
    torch.testing.assert_close(
        shallow(make_merged([4]), targets).logits, deep(make_merged([4]), targets).logits, atol=0, rtol=0
    )
    with pytest.raises(UserError, match=r"blocks\.1.*missing"):
        keep_first_blocks(shallow.state_dict(), make_prior(depth=3))
    with pytest.raises(UserError, match="expected"):
        keep_first_blocks(ARPrior(12, 9, dim=32, depth=1, heads=2).state_dict(), shallow)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="strict or repo"):
        LabelPrior(4, 5, variant="both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ids under 5"):
        LabelPrior(4, 5, prompt=[7])
    with pytest.raises(UserError, match="one_shot"):
        make_prior().generate()
