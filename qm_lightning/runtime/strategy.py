"""The one strategy object of a training: explicit, with a bounded timeout."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy

from qm_lightning.errors import UserError
from qm_lightning.runtime.collective_timeout import collective_timeout
from qm_lightning.runtime.world import World


def backend_of(accelerator: str) -> str:
    """``nccl`` where training runs on GPUs, else ``gloo``."""
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "nccl" if on_gpu else "gloo"


def make_strategy(world: World, requested: Any = "auto", accelerator: str = "auto") -> Strategy | str:
    """Choose the strategy.

    Lightning's own choice under a launcher can be a single-device strategy on every process: N trainings that
    overwrite each other's checkpoints. An explicit object cannot.

    Args:
        world: the processes.
        requested: ``trainer.strategy`` of the configuration: ``"auto"``, ``"ddp"``, ``"fsdp2"`` (for priors
            that outgrow one device), or a ready object.
        accelerator: ``trainer.accelerator``.

    Returns:
        A ``DDPStrategy`` under a launcher (``ShardedStrategy`` for ``fsdp2``), ``"auto"`` for a single process, or
        the requested object.

    Raises:
        UserError: a strategy that would train once per process, or a name we do not run.
    """
    if isinstance(requested, Strategy):
        if world.size > 1 and not isinstance(requested, ParallelStrategy):
            raise UserError(
                f"found {world.size} processes and trainer.strategy={type(requested).__name__}; expected a "
                "strategy that joins them, since each would train alone; leave trainer.strategy out"
            )
        return requested
    if requested not in (None, "auto", "ddp", "fsdp2"):
        raise UserError(
            f"found trainer.strategy={requested!r}; expected auto, ddp or fsdp2; "
            "see configs/trainer/fsdp2.yaml for sharded training"
        )
    if requested == "fsdp2":
        return _sharded(world, accelerator)
    if world.launcher != "torchrun" and world.size == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend=backend_of(accelerator),
        timeout=collective_timeout(),
        # No trainable module has running statistics: no buffer needs rank 0's copy at every step.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _sharded(world: World, accelerator: str) -> Strategy:
    if world.launcher == "plain":
        raise UserError(
            "found trainer.strategy=fsdp2 and no launcher; expected several processes to shard over; start with "
            "configs/launch/torchrun.sh"
        )
    from qm_lightning.runtime.sharded import ShardedStrategy

    return ShardedStrategy(backend_of(accelerator))


def cluster_environment(world: World) -> ClusterEnvironment:
    """Lightning's view of the launcher, named explicitly so that it guesses nothing."""
    if world.launcher == "torchrun":
        return TorchElasticEnvironment()
    if world.launcher == "slurm":
        # Lightning's own requeue saves inside the signal handler, in the middle of whatever runs.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()
