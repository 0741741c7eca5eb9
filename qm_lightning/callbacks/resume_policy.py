"""What a checkpoint restores beyond the exact continuation: weights only, or a new learning-rate schedule."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from qm_lightning.runtime.checkpoint_io import read_checkpoint
from qm_lightning.runtime.run_directory import RunDirectory


class InitialWeights(Callback):
    """Policy ``weights``: a new training from the weights of a checkpoint.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load before training; strict, through the module's own hook for its frozen part."""
        if stage != "fit":
            return
        checkpoint = read_checkpoint(self.path)
        pl_module.on_load_checkpoint(checkpoint)
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
        rank_zero_print(f"resume: weights from {self.path}, everything else from zero")


class ExplicitOptimizer(Callback):
    """Lets the configured optimizer options win over those of the checkpoint.

    Lightning restores the old learning rate over the new one without a word. Here, if the options differ (or
    the policy is ``new_schedule``), the new options and the new schedule hold from the resumed step on; the
    optimizer's moments are kept. If they do not differ, nothing is touched: the resume is exact.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._fresh: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the configured options: the optimizers exist, the checkpoint's state is not yet in them."""
        if self.run.ckpt_path is not None:
            self._fresh = [
                [copy.deepcopy(_options(group)) for group in optimizer.param_groups]
                for optimizer in trainer.optimizers
            ]
            self._schedules = [
                copy.deepcopy(_plain(c.scheduler.state_dict())) for c in trainer.lr_scheduler_configs
            ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the configured options back where they differ from the restored ones."""
        if self.run.ckpt_path is None:
            return
        changes = self._changes(trainer)
        if not changes and self.run.policy != "new_schedule":
            return
        for optimizer, groups in zip(trainer.optimizers, self._fresh, strict=True):
            for group, fresh in zip(optimizer.param_groups, groups, strict=True):
                group.update(fresh)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            _replay(config.scheduler, state)
        what = ", ".join(changes) or "same options"
        rank_zero_print(f"resume: new schedule from step {trainer.global_step} on ({what})")

    def _changes(self, trainer: Trainer) -> list[str]:
        scheduled = {"lr", "initial_lr"} if trainer.lr_scheduler_configs else {"initial_lr"}
        found: dict[str, None] = {}
        for optimizer, groups in zip(trainer.optimizers, self._fresh, strict=True):
            for group, fresh in zip(optimizer.param_groups, groups, strict=True):
                for name in fresh.keys() - scheduled:
                    if group.get(name) != fresh[name]:
                        found[f"{name} {group.get(name)} -> {fresh[name]}"] = None
                # A schedule moves `lr` at every step; the rate that it starts from is what was configured.
                if "initial_lr" in fresh and group.get("initial_lr") != fresh["initial_lr"]:
                    found[f"learning rate {group.get('initial_lr')} -> {fresh['initial_lr']}"] = None
        return list(found)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "lr_lambdas"}


def _replay(scheduler: Any, initial: dict[str, Any]) -> None:
    """Bring a schedule from its configured start to the step that the restored one had reached."""
    steps = int(scheduler.last_epoch)
    scheduler.__dict__.update(initial)
    scheduler.optimizer._opt_called = (
        True  # the steps were taken before the restart: no warning about their order
    )
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
    for _ in range(steps):
        scheduler.step()


@rank_zero_only
def rank_zero_print(line: str) -> None:
    """Print once."""
    print(line, flush=True)
