"""FSDP2 for priors that outgrow one device: sharded in memory, one ordinary checkpoint on disk."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree

from qm_lightning.priors import PriorOutput
from qm_lightning.runtime.checkpoint_io import read_checkpoint
from qm_lightning.runtime.collective_timeout import collective_timeout
from qm_lightning.tokens import MergedTokens


class ShardedStrategy(ModelParallelStrategy):
    """Shards over all processes; checkpoints have the format of DDP's, so that a run may change its strategy.

    Weights and optimizer states are gathered on rank 0's host to be saved. Loading reads the file safely on
    every rank and goes through the module's own hook for its frozen part; Lightning's reader does neither.

    Args:
        backend: ``gloo`` or ``nccl``.
    """

    def __init__(self, backend: str) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=collective_timeout(),
        )

    def setup_environment(self) -> None:
        """Shard over every process, not once per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizers' states to this strategy, too."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file; weights and states are put in place by the two methods below."""
        return read_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Each rank takes its shard."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._module, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, parameters numbered as an unsharded optimizer numbers them."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._module, optimizer, options=options)
        number = {name: i for i, name in enumerate(self._names(optimizer))}
        return _renamed(state, number) if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Each rank takes its shard."""
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self._module, optimizer, optim_state_dict=named, options=options)
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                # torch leaves the learning rate at the configured one.
                group.update({name: value for name, value in saved.items() if name != "params"})

    @property
    def _module(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet; expected Trainer.fit to have set it up")
        return self.model

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names for its parameters."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]
        ],
    }


def shard_trainable(module: LightningModule) -> None:
    """Shard every child with trained parameters, block by block; for ``configure_model``.

    Does nothing under other strategies. Frozen children stay whole on every device.
    """
    mesh = getattr(module, "_device_mesh", None)
    if mesh is None:
        return
    _make_visible(PriorOutput)
    _make_visible(MergedTokens)
    for child in module.children():
        if not any(p.requires_grad for p in child.parameters()):
            continue
        for part in list(child.modules()):
            for block in part if isinstance(part, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(child, mesh=mesh["data_parallel"])


def _make_visible(cls: type) -> None:
    """Let FSDP2 find the tensors in a dataclass that a sharded module returns: gradients start there."""
    if cls not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(cls)
