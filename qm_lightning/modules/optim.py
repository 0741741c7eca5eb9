"""The one recipe that every module trains with: AdamW, linear warm-up, cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from qm_lightning.errors import UserError


@dataclass
class OptimizerOptions:
    """AdamW with a warm-up and a cosine.

    Attributes:
        learning_rate: peak rate.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) have none.
        warmup_steps: optimizer steps of linear warm-up.
        betas: AdamW's averages.
        decay_steps: optimizer steps until the rate is zero; ``None``: the trainer's ``max_steps``.
    """

    learning_rate: float = 1e-3
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
    trainable = [p for _, p in parameters if p.requires_grad]
    steps = options.decay_steps or max_steps
    if steps <= 0:
        raise UserError(
            f"the length of training is unknown (trainer.max_steps={max_steps}); expected a positive number of "
            "steps; set trainer.max_steps, or decay_steps in the module's optimizer options"
        )
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=options.learning_rate, betas=options.betas
    )

    def rate(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
