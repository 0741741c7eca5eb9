"""Lightning's ModelCheckpoint under our names: ``last``, ``best``, ``step_00001000``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from qm_lightning.callbacks.loop_state import between_steps, training_ends, validation_follows
from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO
from qm_lightning.runtime.rendezvous import gather


class StepCheckpoints(ModelCheckpoint):
    """``step_00001000.ckpt`` every so many optimizer steps, and ``last.ckpt`` with each and at the end.

    A step after which validation runs is saved after that validation: Lightning would not run it on resume.

    Args:
        directory: the run's checkpoints/.
        every: optimizer steps between two checkpoints.
    """

    def __init__(self, directory: Path, every: int) -> None:
        if every < 1:
            raise UserError(
                f"found --checkpoint_every {every}; expected a positive number of steps; give one"
            )
        super().__init__(
            dirpath=directory,
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            save_top_k=-1,
            save_last=True,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between optimizer steps only: half-accumulated gradients are in no checkpoint."""
        if not between_steps(trainer) or self._should_skip_saving_checkpoint(trainer):
            return
        due = trainer.global_step % self._every_n_train_steps == 0
        ends = training_ends(trainer)
        if not (due or ends):
            return
        if validation_follows(trainer):
            self._defer_save_until_validation = True
            return
        self._save(trainer, due)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until the validation is over."""
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            self._defer_save_until_validation = False
            self._save(trainer, trainer.global_step % self._every_n_train_steps == 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a save that failed and was not made good, on every rank."""
        io = trainer.strategy.checkpoint_io
        failures = gather(io.failure if isinstance(io, AtomicCheckpointIO) else None)
        if failure := next(filter(None, failures), None):
            raise UserError(f"{failure}; free some space and go on with --ckpt_path last")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the interrupted training was, wherever its directory lies now."""
        super().load_state_dict(_in_directory(state_dict, Path(str(self.dirpath))))

    def _save(self, trainer: Trainer, due: bool) -> None:
        candidates = self._monitor_candidates(trainer)
        if due:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the lowest value of a validation metric so far.

    Args:
        directory: the run's checkpoints/.
        monitor: the metric, lower is better.
    """

    def __init__(self, directory: Path, monitor: str) -> None:
        super().__init__(
            dirpath=directory,
            filename="best",
            monitor=monitor,
            mode="min",
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._missing_said = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best score also where the run directory has moved: a worse one must not take its file.

        Without the file, in another run's directory, the next validation is the best so far.
        """
        moved = _in_directory(state_dict, Path(str(self.dirpath)))
        if Path(moved["best_model_path"]).is_file():
            super().load_state_dict(moved)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the validation that just ended was the best."""
        if self.monitor in trainer.callback_metrics or trainer.sanity_checking:
            super().on_validation_end(trainer, pl_module)
        elif not self._missing_said:
            self._missing_said = True
            rank_zero_warn(f"no best.ckpt: validation logs no {self.monitor!r}")


def _in_directory(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A checkpoint callback's state with its paths in another directory; Lightning forgets the scores there."""

    def there(path: str) -> str:
        return str(directory / Path(path).name) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        "dirpath": str(directory),
        "best_k_models": {there(path): score for path, score in state.get("best_k_models", {}).items()},
        **{name: there(state[name]) for name in paths if name in state},
    }
