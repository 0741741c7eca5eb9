"""The recipe: which parameters AdamW takes, which Muon, and that both resume exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging import DynamicViT
from qm_lightning.modules.muon import MuonWithAdamW
from qm_lightning.modules.optim import OptimizerOptions, build_optimizer
from qm_lightning.priors import ARPrior

MUON = OptimizerOptions(learning_rate=0.01, muon_learning_rate=0.02, warmup_steps=2, weight_decay=0.1)


def _prior(seed: int = 0) -> ARPrior:
    torch.manual_seed(seed)
    return ARPrior(6, 11, dim=16, depth=2, heads=2)


def _recipe(model: nn.Module, options: OptimizerOptions) -> tuple[torch.optim.Optimizer, Any]:
    recipe: Any = build_optimizer(model.named_parameters(), options, 20)
    return recipe["optimizer"], recipe["lr_scheduler"]["scheduler"]


def _names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


def _train(model: ARPrior, optimizer: torch.optim.Optimizer, schedule: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(4, 3, 16)
        places = torch.arange(3).view(1, 3, 1).expand(4, 3, 3)
        loss: Tensor = model.head(model.trunk(x, places, torch.zeros(4, 3))).square().mean() + sum(
            (p.square().sum() for p in model.parameters()), torch.zeros(())
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    prior = _prior()
    optimizer, _ = _recipe(prior, MUON)
    muon, *others = optimizer.param_groups
    hidden = _names(prior, muon["params"])
    assert hidden == {n for n, p in prior.named_parameters() if n.startswith("trunk.blocks.") and p.ndim == 2}
    rest = [p for group in others for p in group["params"]]
    assert _names(prior, rest) == {n for n, _ in prior.named_parameters()} - hidden
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_adamw_takes_what_a_merger_learns() -> None:
    model = nn.ModuleDict({"prior": _prior(), "merger": DynamicViT(input_dim=16)})
    optimizer, _ = _recipe(model, MUON)
    muon, *others = optimizer.param_groups
    assert all(name.startswith("prior.") for name in _names(model, muon["params"]))
    rest = _names(model, [p for group in others for p in group["params"]])
    assert {name for name, _ in model.named_parameters() if name.startswith("merger.")} < rest


def test_every_parameter_moves_as_its_own_optimizer_moves_it() -> None:
    prior = _prior()
    alone = copy.deepcopy(prior)
    optimizer, schedule = _recipe(prior, MUON)
    hidden = [p for n, p in alone.named_parameters() if n.startswith("trunk.blocks.") and p.ndim == 2]
    rest = [p for n, p in alone.named_parameters() if not (n.startswith("trunk.blocks.") and p.ndim == 2)]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.005,
        betas=(0.9, 0.95),
    )
    for model, steps in ((prior, [optimizer]), (alone, [muon, adamw])):
        torch.manual_seed(3)
        loss = sum((p.square().sum() * (1 + i) for i, p in enumerate(model.parameters())), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        for step in steps:
            step.step()
    assert schedule.get_last_lr() == [0.01, 0.005, 0.005]  # the first of two steps of warm-up
    for mine, theirs in zip(prior.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [MUON, OptimizerOptions(learning_rate=0.01)], ids=["muon", "adamw"])
def test_a_resumed_training_is_the_unbroken_one(options: OptimizerOptions) -> None:
    whole = _prior()
    optimizer, schedule = _recipe(whole, options)
    _train(whole, optimizer, schedule, range(8))

    first = _prior()
    optimizer, schedule = _recipe(first, options)
    _train(first, optimizer, schedule, range(5))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), schedule.state_dict()))

    second = _prior(seed=1)
    optimizer, schedule = _recipe(second, options)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    _train(second, optimizer, schedule, range(5, 8))
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_closure_is_called_once_with_gradients() -> None:
    prior = _prior()
    optimizer, _ = _recipe(prior, MUON)
    assert isinstance(optimizer, MuonWithAdamW)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = sum((p.square().sum() for p in prior.parameters()), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss is not None
    assert float(loss) > 0


def test_muon_without_a_transformer_is_refused() -> None:
    with pytest.raises(UserError, match="leave muon_learning_rate out"):
        build_optimizer(nn.Linear(2, 2).named_parameters(), MUON, 10)
