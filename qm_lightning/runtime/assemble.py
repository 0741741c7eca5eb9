"""The callbacks that every training has."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from qm_lightning.callbacks.nan_guard import NaNGuard
from qm_lightning.callbacks.preemption import PreemptionGuard
from qm_lightning.callbacks.rng import StatelessRNG
from qm_lightning.callbacks.same_start import SameStart
from qm_lightning.runtime.run_directory import RunDirectory

MONITOR = "val/quality/nats"


def always_on_callbacks(run: RunDirectory, *, seed: int, checkpoint_every: int) -> list[Callback]:
    """Checkpoints under stable names, and what keeps a run exact and stoppable.

    Args:
        run: the run's directory.
        seed: of the run.
        checkpoint_every: optimizer steps between checkpoints.

    Returns:
        Callbacks for the trainer.
    """
    steps = ModelCheckpoint(
        run.checkpoints,
        filename="step_{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=checkpoint_every,
        save_on_train_epoch_end=False,
        save_top_k=-1,
        save_last=True,
    )
    best = ModelCheckpoint(
        run.checkpoints,
        filename="best",
        monitor=MONITOR,
        mode="min",
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    guards = [SameStart(), StatelessRNG(seed), NaNGuard(), PreemptionGuard(run.checkpoints)]
    return [*guards, LearningRateMonitor("step"), steps, best]
