"""What every training gets, whatever its configuration: callbacks, strategy, plugins."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback

from qm_lightning.callbacks.checkpoints import BestCheckpoint, StepCheckpoints
from qm_lightning.callbacks.monitor import TrainingMonitor
from qm_lightning.callbacks.preemption import PreemptionGuard
from qm_lightning.callbacks.resume_policy import ExplicitOptimizer, InitialWeights
from qm_lightning.callbacks.rng import StatelessRNG
from qm_lightning.callbacks.run_record import RunRecord
from qm_lightning.callbacks.same_start import SameStart
from qm_lightning.callbacks.throughput import Throughput
from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO
from qm_lightning.runtime.run_directory import RunDirectory
from qm_lightning.runtime.strategy import cluster_environment, make_strategy
from qm_lightning.runtime.world import resolve_world


def always_on_callbacks(
    run: RunDirectory, seed: int, checkpoint_every: int = 100, monitor: str = "val/quality/nats"
) -> list[Callback]:
    """The callbacks of every fit, in the order in which they must run.

    Args:
        run: the opened run directory.
        seed: the run's seed.
        checkpoint_every: optimizer steps between two checkpoints.
        monitor: validation metric of ``best.ckpt``, lower is better.

    Returns:
        New callbacks.
    """
    callbacks: list[Callback] = [
        SameStart(),
        ExplicitOptimizer(run),
        StatelessRNG(seed),
        TrainingMonitor(),
        Throughput(),
    ]
    if run.initial_weights is not None:
        callbacks.append(InitialWeights(run.initial_weights))
    # The guard comes late: what others count in a step must be counted before it leaves. Lightning puts
    # checkpoints last; `best` before `step`, whose file then knows the newest best score.
    return [
        *callbacks,
        RunRecord(run),
        PreemptionGuard(run),
        BestCheckpoint(run.checkpoints, monitor),
        StepCheckpoints(run.checkpoints, checkpoint_every),
    ]


def trainer_arguments(options: Any) -> dict[str, Any]:
    """Sizes, strategy and plugins of the trainer, from the launcher.

    Args:
        options: ``trainer`` of the configuration: ``strategy``, ``accelerator``, ``devices``, ``plugins``.

    Returns:
        Arguments that override the configuration's.

    Raises:
        UserError: several devices without a launcher, or a strategy that would train once per process.
    """
    world = resolve_world(os.environ)
    devices = options.get("devices", "auto")
    if world.launcher == "plain" and devices not in ("auto", "1", 1, -1, "-1"):
        raise UserError(
            f"found trainer.devices={devices!r} and no launcher; expected the sizes from a launcher; start with "
            f"`torchrun --standalone --nproc-per-node={devices} -- train.py ...` and leave trainer.devices out"
        )
    accelerator = options.get("accelerator", "auto")
    accelerator = accelerator if isinstance(accelerator, str) else accelerator.name()
    configured = options.get("plugins") or []
    configured = configured if isinstance(configured, list) else [configured]
    return {
        "devices": world.devices,
        "num_nodes": world.num_nodes,
        "strategy": make_strategy(world, options.get("strategy", "auto"), accelerator),
        "plugins": [*configured, AtomicCheckpointIO(), cluster_environment(world)],
    }
