"""Sizes come from the launcher; what would train once per process is refused."""

import pytest

from qm_lightning.errors import UserError
from qm_lightning.runtime.world import World, resolve_world, slurm_job_name

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "j1",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_RESTART_COUNT": "1",
}  # fmt: skip


def test_no_launcher_is_one_process() -> None:
    assert resolve_world({}) == World()
    assert World().size == 1


def test_torchrun() -> None:
    world = resolve_world(TORCHRUN)
    assert (world.launcher, world.devices, world.num_nodes, world.size) == ("torchrun", 4, 2, 8)
    assert (world.rank, world.local_rank, world.restarts, world.launch_id) == (5, 1, 2, "torchrun-j1")


def test_torchrun_without_an_id_has_a_name_too_common_to_recognise_a_job_by() -> None:
    assert resolve_world(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}).launch_id is None


def test_slurm() -> None:
    world = resolve_world(SLURM)
    assert (world.launcher, world.devices, world.num_nodes, world.rank) == ("slurm", 4, 2, 5)
    assert (world.restarts, world.launch_id) == (1, "slurm-77")


def test_torchrun_inside_a_slurm_job_is_torchrun() -> None:
    assert resolve_world(SLURM | TORCHRUN).launcher == "torchrun"


def test_a_single_slurm_task_is_plain_but_keeps_its_job() -> None:
    world = resolve_world(SLURM | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0"})
    assert (world.launcher, world.size, world.launch_id) == ("plain", 1, "slurm-77")


def test_a_job_array_is_requeued_by_task() -> None:
    array = {"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm_job_name(array) == "77_3"


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        (TORCHRUN | {"WORLD_SIZE": "7"}, "WORLD_SIZE=7"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        (SLURM | {"SLURM_NTASKS": "7"}, "7 SLURM tasks"),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "2"}, "SLURM_NTASKS_PER_NODE=2"),
    ],
)
def test_sizes_that_would_train_apart_are_refused(env: dict[str, str], found: str) -> None:
    with pytest.raises(UserError, match="expected") as caught:
        resolve_world(env)
    assert found in str(caught.value)
