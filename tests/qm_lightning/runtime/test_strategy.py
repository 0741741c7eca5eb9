"""The strategy is an explicit object with a bounded timeout, or the training is refused."""

from datetime import timedelta

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from qm_lightning.errors import UserError
from qm_lightning.runtime.assemble import trainer_arguments
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO
from qm_lightning.runtime.strategy import cluster_environment, make_strategy
from qm_lightning.runtime.world import World

TWO = World(launcher="torchrun", devices=2)


def test_one_process_needs_no_strategy() -> None:
    assert make_strategy(World()) == "auto"


@pytest.mark.parametrize("world", [TWO, World(launcher="torchrun"), World(launcher="slurm", num_nodes=2)])
def test_a_launcher_gets_an_explicit_ddp_object(world: World) -> None:
    strategy = make_strategy(world, "auto", "cpu")
    assert isinstance(strategy, DDPStrategy)
    assert strategy.process_group_backend == "gloo"
    assert strategy._timeout == timedelta(minutes=5)
    assert strategy._ddp_kwargs["broadcast_buffers"] is False


def test_a_strategy_that_trains_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 processes and trainer\.strategy=SingleDeviceStrategy"):
        make_strategy(TWO, SingleDeviceStrategy("cpu"))


def test_a_sharding_strategy_object_is_taken_as_it_is() -> None:
    sharded = ModelParallelStrategy()
    assert make_strategy(TWO, sharded) is sharded


def test_a_strategy_that_we_do_not_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer.strategy='fsdp'.*fsdp2.yaml"):
        make_strategy(TWO, "fsdp")


def test_cluster_environments_are_named_not_guessed() -> None:
    assert isinstance(cluster_environment(TWO), TorchElasticEnvironment)
    assert isinstance(cluster_environment(World()), LightningEnvironment)
    slurm = cluster_environment(World(launcher="slurm"))
    assert isinstance(slurm, SLURMEnvironment)
    assert slurm.auto_requeue is False  # Lightning's own saves inside the signal handler


def test_several_devices_without_a_launcher_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun --standalone --nproc-per-node=2"):
        trainer_arguments({"devices": 2, "accelerator": "cpu"})


def test_the_launchers_sizes_overrule_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    arguments = trainer_arguments({"devices": 1, "accelerator": "cpu"})
    assert (arguments["devices"], arguments["num_nodes"]) == (2, 2)
    assert any(isinstance(plugin, AtomicCheckpointIO) for plugin in arguments["plugins"])
