"""InBackbone: tokens removed between the layers of real Hugging Face encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbone_families import make_inputs, save_family
from torch import Tensor

from qm_lightning.backbones import HFBackbone, InBackbone, recording
from qm_lightning.backbones.in_backbone import _sibling, reducible_layers
from qm_lightning.backbones.policy_attention import policy_attention
from qm_lightning.backbones.recording import Steering
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.errors import UserError
from qm_lightning.merging import (
    SCOPE,
    Budget,
    DynamicViT,
    EntropyBudget,
    EViT,
    FixedBudget,
    NoMerge,
    PiToMe,
    QuickMerge,
    Schedule,
    ToFu,
    ToMe,
    TopKPrune,
)
from qm_lightning.tokens import Keep, Tokens

FITS = ["vit", "dinov2", "clip", "videomae", "bert", "roberta"]
MERGERS: dict[str, Any] = {
    "ToMe": lambda b: ToMe(b),
    "ToFu-mlerp": lambda b: ToFu(b, mode="mlerp"),
    "ToFu-prune": lambda b: ToFu(b, mode="prune"),
    "EViT": lambda b: EViT(b),
    "PiToMe": lambda b: PiToMe(b),
    "SCOPE": lambda b: SCOPE(b),
    "TopKPrune": lambda b: TopKPrune(b),
    "QuickMerge": lambda b: QuickMerge(b),
    "DynamicViT": lambda b: DynamicViT(b),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    names = [*FITS, "llama", "gpt2", "modernbert", "t5", "dinov3"]
    return {name: str(save_family(name, root)) for name in names}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real ViT of six layers on 64 patches."""
    torch.manual_seed(0)
    model = small_vit(width=32, depth=6, heads=4)
    folder: Path = tmp_path_factory.mktemp("vit")
    save_backbone(model, folder, preprocessing_of(model))
    return str(folder)


def pictures(samples: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, 1, 64, 64, generator=torch.Generator().manual_seed(seed))}


def inside(name: str, budget: Budget | None = None, **options: Any) -> InBackbone:
    torch.manual_seed(1)
    return InBackbone(MERGERS[name](budget or FixedBudget(2.37)), **options).eval()


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("special", ["drop", "protect"])
def test_exact_total_and_provenance(name: str, special: Any, vit: str) -> None:
    backbone = HFBackbone(vit, special_tokens=special)
    merger = inside(name)
    merger.prepare(backbone)
    plain = backbone(pictures())
    merged = merger.encode(backbone, pictures())
    n = 64 if special == "drop" else 65
    assert merged.assignment.shape == plain.mask.shape == (3, n)
    assert merged.mask.sum(1).tolist() == [round(n / 2.37)] * 3
    assert merged.counts is not None
    assert merged.counts.tolist() == [n] * 3
    assert merged.anchors is not None
    for b in range(3):
        k = int(merged.mask[b].sum())
        group = merged.assignment[b]
        assert set(group[group >= 0].tolist()) == set(range(k))
        members = torch.bincount(group[group >= 0], minlength=k)
        assert torch.equal(merged.size[b, :k], members.to(merged.size.dtype))
        assert (merged.anchors[b, :k].diff() > 0).all()
        assert torch.equal(merged.positions[b, :k], plain.positions[b, merged.anchors[b, :k]])
        assert torch.equal(group[merged.anchors[b, :k]], torch.arange(k))
        assert (merged.ready[b, :k] == n - 1).all()
        torch.testing.assert_close(
            merged.weights.new_zeros(k).scatter_add(0, group[group >= 0], merged.weights[b][group >= 0]) > 0,
            torch.ones(k, dtype=torch.bool),
        )
    if name in ("ToMe", "EViT", "PiToMe", "QuickMerge"):
        assert (merged.assignment >= 0).all()
    if special == "protect":
        assert (merged.assignment[:, 0] == 0).all()
        assert (merged.size[:, 0] == 1).all()


def test_nothing_to_remove_is_the_plain_backbone(vit: str) -> None:
    backbone = HFBackbone(vit)
    merged = inside("ToMe", FixedBudget(1.0)).encode(backbone, pictures())
    torch.testing.assert_close(merged.values, backbone(pictures()).values, rtol=0, atol=2e-6)
    assert torch.equal(merged.assignment, torch.arange(64).expand(3, 64))


@pytest.mark.parametrize("family", FITS)
def test_families_that_fit(family: str, folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders[family], received=True)
    inputs = make_inputs(family)
    plain = backbone(inputs)
    for name in ("ToMe", "EViT", "DynamicViT"):
        merger = inside(name, FixedBudget(2.0))
        merger.prepare(backbone)
        merged = merger.encode(backbone, inputs)
        want = FixedBudget(2.0)(plain.mask.float(), plain.mask)
        assert torch.equal(merged.mask.sum(1), want)
        assert (merged.assignment[~plain.mask] == -1).all()
        assert merged.values.isfinite().all()


def test_padding_and_batch_change_nothing(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["bert"])
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) < torch.tensor([20, 13])[:, None]
    for name in ("ToMe", "ToFu-prune", "QuickMerge", "DynamicViT"):
        merger = inside(name, FixedBudget(2.0))
        merger.prepare(backbone)
        both = merger.encode(backbone, {"input_ids": ids, "attention_mask": mask.long()})
        alone = merger.encode(backbone, {"input_ids": ids[1:, :13], "attention_mask": mask[1:, :13].long()})
        k = int(alone.mask.sum())
        assert torch.equal(both.assignment[1, :13], alone.assignment[0])
        torch.testing.assert_close(both.values[1, :k], alone.values[0, :k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "modernbert", "t5", "dinov3"])
def test_backbones_that_do_not_fit(family: str, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="InBackbone cannot remove tokens between the layers") as caught:
        inside("ToMe").prepare(HFBackbone(folders[family]))
    assert "behind the backbone" in str(caught.value)


def test_mistakes(vit: str, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"merger=NoMerge.*a budget of tokens"):
        InBackbone(NoMerge())
    with pytest.raises(UserError, match=r"before layers \[3, 9\] of a backbone with 6"):
        InBackbone(ToMe(), Schedule([3, 9])).prepare(HFBackbone(vit))
    with pytest.raises(UserError, match="encode"):
        InBackbone(ToMe())(HFBackbone(vit)(pictures()))
    with pytest.raises(UserError, match="frame by frame"):
        inside("ToMe").encode(HFBackbone(vit), {"pixel_values": torch.zeros(1, 2, 1, 64, 64)})


def test_duplicated_tokens_count_as_often_as_they_were(vit: str) -> None:
    """Proportional attention: one key of size 2 is two equal keys."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    twice = [torch.cat([x, x[:, :, 4:]], 2) for x in (key, value)]
    bias = torch.tensor([1.0, 1, 1, 1, 2]).log()
    got = F.scaled_dot_product_attention(query, key, value, bias[None, None, None])
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, *twice))
    # And the layers do get that bias.
    backbone, seen = HFBackbone(vit), []
    layers = reducible_layers(backbone)

    def note(*_: Any) -> None:
        record = recording._record.get()
        assert record is not None
        seen.append(record.steering)

    handle = layers[-1].register_forward_pre_hook(note)
    merged = inside("ToMe", proportional=True).encode(backbone, pictures())
    handle.remove()
    assert isinstance(seen[0], Steering)
    assert seen[0].bias is not None
    torch.testing.assert_close(seen[0].bias[:, 0, 0, 1:].exp(), merged.size)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_weights_and_classes_are_untouched(vit: str) -> None:
    backbone = HFBackbone(vit)
    before = backbone.fingerprint()
    plain = backbone(pictures()).values
    forward = type(reducible_layers(backbone)[0]).forward
    merger = inside("ToMe")
    merger.prepare(backbone)
    merger.stages[2].rounds = "many"  # type: ignore[assignment]  # fails half-way through the layers
    with pytest.raises(TypeError):
        merger.encode(backbone, pictures())
    inside("ToMe").encode(backbone, pictures())
    assert type(reducible_layers(backbone)[0]).forward is forward
    assert torch.equal(backbone(pictures()).values, plain)
    backbone._fingerprint = None
    assert backbone.fingerprint() == before


class TestDynamicViT:
    def test_masked_run_equals_gathered_run(self, vit: str) -> None:
        """The parity on which the method rests: masking dropped tokens is as good as removing them."""
        backbone = HFBackbone(vit)
        merger = InBackbone(DynamicViT(FixedBudget(2.9)), Schedule([2, 3, 5], "geometric"))
        torch.manual_seed(3)
        merger.prepare(backbone)
        gathered = merger.eval().encode(backbone, pictures())
        # Training mode of the wrapper alone: dropped tokens stay, the predictors choose without noise.
        merger.training = True
        with torch.no_grad():
            masked = merger.encode(backbone, pictures())
        assert torch.equal(masked.assignment, gathered.assignment)
        torch.testing.assert_close(masked.values, gathered.values, rtol=0, atol=5e-6)

    def test_predictors_learn_from_the_plain_backbone(self, vit: str) -> None:
        backbone = HFBackbone(vit)
        merger = InBackbone(DynamicViT(FixedBudget(2.0)), Schedule([2, 4], "geometric"))
        torch.manual_seed(3)
        merger.prepare(backbone)
        assert len(merger.stages) == 2
        first, second = (list(stage.parameters()) for stage in merger.stages)
        assert not torch.equal(first[2], second[2])  # fresh weights at each place
        merger.train()
        optimizer = torch.optim.Adam(merger.parameters(), lr=3e-3)
        history = []
        for step in range(30):
            inputs = pictures(8, seed=step % 4)
            merged = merger.encode(backbone, inputs, backbone(inputs))
            assert set(merged.losses) == {"ratio", "distill"}
            loss = sum(merged.losses.values(), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                assert all(p.grad is not None and p.grad.isfinite().all() for p in merger.parameters())
                assert all(sum(float(p.grad.abs().sum()) for p in part) > 0 for part in (first, second))  # type: ignore[union-attr]
            optimizer.step()
            history.append(loss.item())
        assert sum(history[-8:]) < 0.8 * sum(history[:8])
        assert all(p.grad is None for p in backbone.parameters())

    def test_what_is_dropped_stays_dropped(self) -> None:
        policy = torch.tensor([[1.0, 1, 0, 1, 0, 1]])
        torch.manual_seed(0)
        mask = torch.ones(1, 6, dtype=torch.bool)
        keep = Keep(torch.tensor([3]), 3)
        tokens = Tokens(torch.randn(1, 6, 8), mask, torch.arange(6)[None, :, None], keep=keep)
        for training in (True, False):
            for seed in range(5):
                merger = DynamicViT(input_dim=8, seed=seed).train(training)
                gates, _ = merger.decide(tokens, policy)
                assert ((gates == 0) | (gates == 1)).all()
                assert (gates[policy == 0] == 0).all()
                assert gates.sum() >= 1
                if not training:
                    assert gates.sum() == 3

    def test_ratio_loss_is_per_sample(self) -> None:
        merger = DynamicViT(input_dim=8, ratio_weight=1.0)
        gates = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
        loss = merger._ratio_loss(gates, torch.ones(2, 4, dtype=torch.bool), torch.tensor([2, 2]))
        assert loss.item() == pytest.approx(0.0625)

    def test_policy_attention_by_hand(self) -> None:
        zero = torch.zeros(1, 1, 3, 4)
        value = torch.eye(3)[None, None]
        mask = torch.ones(1, 3, dtype=torch.bool)
        got = policy_attention(zero, zero, value, torch.tensor([[1.0, 1.0, 0.0]]), mask, 1.0)
        want = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
        torch.testing.assert_close(got[0, 0], want, rtol=0, atol=1e-6)
        q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(7) < torch.tensor([7, 5])[:, None]
        got = policy_attention(q, k, v, mask.float(), mask, 8**-0.5)
        want = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(got[1, :, :5], want[1, :, :5], rtol=0, atol=2e-6)

    def test_a_dropped_tokens_logit_gets_a_gradient(self, vit: str) -> None:
        policy = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
        q, k, v = torch.randn(3, 1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(1, 3, dtype=torch.bool)
        policy_attention(q, k, v, policy, mask, 0.5).square().sum().backward()
        assert policy.grad is not None
        assert policy.grad[0, 2].abs() > 1e-4


def test_an_entropy_budget_counts_once(vit: str) -> None:
    """The controller takes one step per batch, whatever the number of places."""
    backbone = HFBackbone(vit)
    budget = EntropyBudget(3.0)
    merger = InBackbone(ToMe(), budget=budget)
    merger.prepare(backbone)
    merger.train()
    merged = merger.encode(backbone, pictures())
    assert budget.averages.tolist() == [3 * 64, int(merged.mask.sum())]
    assert merged.mask.sum(1).min() >= 0.5 * 64 / 3 - 1


def test_noise_differs_between_places() -> None:
    merger = QuickMerge(seed=5)
    wrapped = InBackbone(merger, Schedule([1, 2, 3]))
    sibling = _sibling(wrapped.stages[0], 2)
    assert isinstance(sibling, QuickMerge)
    assert sibling.noise.seed == 7
    assert merger.noise.seed == 5
