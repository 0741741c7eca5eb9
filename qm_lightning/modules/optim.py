"""The one recipe that every module trains with: AdamW or Muon, linear warm-up, cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from qm_lightning.errors import UserError
from qm_lightning.modules.muon import MuonWithAdamW


@dataclass
class OptimizerOptions:
    """AdamW, or Muon for the matrices of hidden layers, with a warm-up and a cosine.

    Attributes:
        learning_rate: peak rate of AdamW.
        muon_learning_rate: peak rate of Muon, which then takes the matrices of the transformer blocks and leaves
            AdamW the rest; 0: AdamW takes all.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) have none.
        warmup_steps: optimizer steps of linear warm-up.
        betas: AdamW's averages.
        decay_steps: optimizer steps until the rate is zero; ``None``: the trainer's ``max_steps``.
    """

    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.05
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    decay_steps: int | None = None


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions, max_steps: int
) -> OptimizerLRSchedulerConfig:
    """Make the optimizer over the trainable parameters and its schedule.

    Args:
        parameters: named parameters; frozen ones are left out.
        options: the recipe.
        max_steps: optimizer steps of the whole training, from the trainer's configuration. Lightning's
            ``estimated_stepping_batches`` is not used: reading it drops the data position on resume.

    Returns:
        What ``configure_optimizers`` returns.

    Raises:
        UserError: no length of training is known.
    """
    trainable = {name: p for name, p in parameters if p.requires_grad}
    steps = options.decay_steps or max_steps
    if steps <= 0:
        raise UserError(
            f"the length of training is unknown (trainer.max_steps={max_steps}); expected a positive number of "
            "steps; set trainer.max_steps, or decay_steps in the module's optimizer options"
        )
    optimizer = _optimizer(trainable, options)

    def rate(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _optimizer(trainable: dict[str, nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    hidden = [] if options.muon_learning_rate == 0 else [n for n in trainable if _is_hidden(n, trainable[n])]
    rest = [p for name, p in trainable.items() if name not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.muon_learning_rate == 0:
        return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)
    if not hidden:
        raise UserError(
            "muon_learning_rate is set and the model trains no matrix of a numbered block; expected a transformer; "
            "leave muon_learning_rate out"
        )
    return MuonWithAdamW(
        [trainable[name] for name in hidden],
        groups,
        options.learning_rate,
        options.muon_learning_rate,
        options.weight_decay,
        options.betas,
    )


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """A matrix inside a numbered block, such as ``prior.trunk.blocks.0.mlp.project_in.weight``.

    What a merger learns is a small head that scores tokens, and no block: under Muon DynamicViT keeps worse ones.
    """
    parts = name.split(".")
    return parameter.ndim == 2 and parts[0] != "merger" and any(part.isdigit() for part in parts)
