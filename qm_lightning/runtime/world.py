"""Sizes of the job, from its launcher, never from YAML (spec runtime.md, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from qm_lightning.errors import UserError

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """Sizes of a job.

    Attributes:
        devices: processes on this node.
        num_nodes: nodes.
        launched: a launcher (torchrun, SLURM) set the sizes.
    """

    devices: int
    num_nodes: int
    launched: bool

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes


def _number(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher set {key}={env.get(key)!r}; expected a whole number; start with torchrun or srun"
        ) from error


def resolve_world(env: Mapping[str, str], devices: int = 1) -> World:
    """Read the sizes that torchrun or SLURM set.

    Args:
        env: environment variables.
        devices: processes for a plain start without a launcher.

    Returns:
        The sizes.

    Raises:
        UserError: sizes that contradict each other.
    """
    if "WORLD_SIZE" in env and "LOCAL_WORLD_SIZE" in env:
        total, local = _number(env, "WORLD_SIZE"), _number(env, "LOCAL_WORLD_SIZE")
        launched = True
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive", None):
        total = _number(env, "SLURM_NTASKS")
        local = _number(env, "SLURM_NTASKS_PER_NODE") if "SLURM_NTASKS_PER_NODE" in env else total
        launched = True
    else:
        total = local = devices
        launched = "LOCAL_RANK" in env  # a process that Lightning itself started
    if local < 1 or total % local:
        raise UserError(
            f"{total} processes in all and {local} on this node: expected the same number on every node; "
            "give every node the same --nproc-per-node"
        )
    return World(local, total // local, launched)


def make_strategy(world: World) -> DDPStrategy | str:
    """An explicit DDP object wherever several processes run, so that none trains on its own by accident.

    Args:
        world: sizes of the job.

    Returns:
        ``"auto"`` for one plain process, else DDP over gloo (CPU) or NCCL (GPU) with a timeout of five minutes.
    """
    if world.size == 1 and not world.launched:
        return "auto"
    options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return DDPStrategy(process_group_backend=backend, timeout=TIMEOUT, **options)
