"""How many processes there are and which one this is, read from the launcher's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qm_lightning.errors import UserError

Launcher = Literal["plain", "torchrun", "slurm"]

# Launchers that start several processes but that we do not speak with: each process would train alone.
_FOREIGN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """The processes of one training.

    Attributes:
        launcher: who started them.
        devices: processes on each node, one device each.
        num_nodes: nodes.
        rank: this process, in [0, size).
        local_rank: this process on its node, in [0, devices).
        restarts: how often the launcher has already restarted the job.
        launch_id: the launcher's name of this job, the same after a restart; ``None`` if it has none.
    """

    launcher: Launcher = "plain"
    devices: int = 1
    num_nodes: int = 1
    rank: int = 0
    local_rank: int = 0
    restarts: int = 0
    launch_id: str | None = None

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes


def resolve_world(env: Mapping[str, str]) -> World:
    """Read the sizes from torchrun, from SLURM, or take one process.

    Args:
        env: the process's environment.

    Returns:
        The world; one process if no launcher is found.

    Raises:
        UserError: sizes that contradict each other, or a launcher that we do not speak with.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        return _torchrun(env)
    if "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        return _slurm(env)
    for name in _FOREIGN_SIZES:
        if _number(env, name, 1) > 1:
            raise UserError(
                f"found {name}={env[name]} but neither torchrun's nor SLURM's variables; expected one of "
                "these launchers, since every process would train alone; start with torchrun or srun"
            )
    if _number(env, "WORLD_SIZE", 1) > 1:
        raise UserError(
            f"found WORLD_SIZE={env['WORLD_SIZE']} without RANK and LOCAL_RANK; expected all three; "
            "start with torchrun, or unset WORLD_SIZE to train in one process"
        )
    if "SLURM_JOB_ID" in env and "SLURM_PROCID" in env:
        return World(restarts=_number(env, "SLURM_RESTART_COUNT", 0), launch_id=_slurm_job(env))
    return World()


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"found {name}={text!r}; expected a whole number; mend the launch script") from None


def _torchrun(env: Mapping[str, str]) -> World:
    size, devices = _number(env, "WORLD_SIZE", 1), _number(env, "LOCAL_WORLD_SIZE", 1)
    if size % devices:
        raise UserError(
            f"found WORLD_SIZE={size} and LOCAL_WORLD_SIZE={devices}; expected the same number of processes "
            "on every node; give every node the same --nproc-per-node"
        )
    # torchrun names a job "none" unless --rdzv-id is given: too common a name to recognise a job by.
    name = env.get("TORCHELASTIC_RUN_ID", "none")
    return World(
        launcher="torchrun",
        devices=devices,
        num_nodes=size // devices,
        rank=_number(env, "RANK", 0),
        local_rank=_number(env, "LOCAL_RANK", 0),
        restarts=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        launch_id=None if name == "none" else f"torchrun-{name}",
    )


def _slurm(env: Mapping[str, str]) -> World:
    size, nodes = _number(env, "SLURM_NTASKS", 1), _number(env, "SLURM_NNODES", 1)
    if size % nodes:
        raise UserError(
            f"found {size} SLURM tasks on {nodes} nodes; expected the same number on every node; "
            "set --ntasks-per-node to the GPUs of a node and leave --ntasks out"
        )
    devices = size // nodes
    per_node = _number(env, "SLURM_NTASKS_PER_NODE", devices)
    if per_node != devices:
        raise UserError(
            f"found SLURM_NTASKS_PER_NODE={per_node} but {size} tasks on {nodes} nodes; expected "
            f"{per_node * nodes} tasks; set --nodes and --ntasks-per-node only"
        )
    return World(
        launcher="slurm",
        devices=devices,
        num_nodes=nodes,
        rank=_number(env, "SLURM_PROCID", 0),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        restarts=_number(env, "SLURM_RESTART_COUNT", 0),
        launch_id=_slurm_job(env),
    )


def _slurm_job(env: Mapping[str, str]) -> str:
    return f"slurm-{slurm_job_name(env)}"


def slurm_job_name(env: Mapping[str, str]) -> str:
    """What ``scontrol requeue`` takes: the job, or the task of a job array."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")
