"""What a cost measurement counts, and that it leaves the module as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.costs import activation_bytes, measure_cost
from qm_lightning.merging import DynamicViT, EntropyBudget, FixedBudget, NoMerge, QuickMerge
from qm_lightning.modules import QuickMergeModule
from qm_lightning.priors import ARPrior


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> HFBackbone:
    folder = tmp_path_factory.mktemp("costs") / "backbone"
    model = small_vit(width=32, depth=2, heads=2)
    save_backbone(model, folder, preprocessing_of(model))
    return HFBackbone(str(folder), layers=2)


def batch() -> dict[str, Any]:
    return {
        "inputs": {"pixel_values": torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))},
        "targets": torch.tensor([[1, 2, 6], [3, 6, -100]]),
        "valid": torch.tensor([True, True]),
        "seeds": torch.tensor([3, 4]),
    }


def cost(backbone: HFBackbone, merger: Any) -> dict[str, float]:
    torch.manual_seed(0)
    module = QuickMergeModule(backbone, merger, ARPrior(32, 7, dim=16, depth=1, heads=2))
    return measure_cost(module, batch(), rounds=1)


def test_saved_activations_of_a_product() -> None:
    weight = torch.ones(3, 5, requires_grad=True)
    x = torch.ones(2, 3)
    assert activation_bytes(lambda: (x @ weight).sum()) == x.numel() * 4  # the weight's gradient needs x


def test_memory_is_that_of_training_where_a_merger_keeps_every_token(backbone: HFBackbone) -> None:
    """Merged tokens of a training step, not of evaluation: `faint` and DynamicViT's mask hold all 64."""
    everything = cost(backbone, NoMerge())["peak_memory_bytes"]
    plain = cost(backbone, QuickMerge(FixedBudget(4.0), learn_weights=True))
    faint = cost(backbone, QuickMerge(FixedBudget(4.0), learn_weights=True, sharpness=1.0, faint=0.01))
    masked = cost(backbone, DynamicViT(FixedBudget(4.0)))
    assert plain["peak_memory_bytes"] < 0.6 * everything
    assert min(faint["peak_memory_bytes"], masked["peak_memory_bytes"]) >= everything
    assert plain["prior_flops_per_sample"] == faint["prior_flops_per_sample"]  # these are evaluation's


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_module_as_it_was(training: bool, backbone: HFBackbone) -> None:
    merger = QuickMerge(EntropyBudget(4.0), learn_weights=True)
    module = QuickMergeModule(backbone, merger, ARPrior(32, 7, dim=16, depth=1, heads=2))
    module.train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure_cost(module, batch(), rounds=1)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert module.training == merger.training == merger.budget.training == training
    assert not backbone.training
