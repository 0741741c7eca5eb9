"""The callback that makes a resume exact under Lightning's Trainer.

Lightning counts batches; the stream counts samples. Two things must be brought together: the saved position
must be that of the last *applied optimizer step* (not of the last batch, of which gradients may be waiting in
an open accumulation window), and after a resume with other numbers of ranks or samples per batch Lightning's
batch counter must be translated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves

from datamodules.errors import DataError
from datamodules.shards.loader import StreamLoader
from datamodules.shards.mixture import MixtureLoader

log = logging.getLogger(__name__)

TrainLoader = StreamLoader | MixtureLoader

TESTED_LIGHTNING = ("2.6",)
"""Minor versions whose progress counters, a private interface, this callback is tested with."""

_COUNTERS = ("ready", "started", "processed", "completed")


class ExactResume(Callback):
    """Tells the stream which samples were trained, and Lightning how many batches that is.

    Works with automatic and manual optimisation, gradient accumulation, checkpoints at any moment (also from
    a signal handler or after an exception) and several epochs.
    """

    def __init__(self) -> None:
        self._loader: TrainLoader | None = None
        self._in_flight: tuple[int, int] | None = None
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Translate Lightning's counters when a run resumes in the middle of an epoch, or at its very end."""
        loader = self._attach(trainer)
        if loader is not None and trainer.fit_loop.restarting:
            _recount(trainer, loader)
            _begin_epoch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch whose training begins."""
        if self._attach(trainer) is None:
            return
        self._settle(trainer)
        if not isinstance(batch, Mapping) or "progress" not in batch:
            raise DataError(
                f"the training batch is a {type(batch).__name__} without the key 'progress', which exact "
                "resume needs: keep the batch a dict in on_before_batch_transfer and on_after_batch_transfer"
            )
        self._in_flight = (int(batch["progress"][0]), int(batch["progress"][1]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Commit the position if this batch brought an optimizer step."""
        self._settle(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when a batch limit leaves a part of the epoch unread."""
        loader, limit = self._loader, trainer.num_training_batches
        if loader is not None and limit < len(loader):
            log.info("limit_train_batches: %d of %d batches of this epoch were read", limit, len(loader))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the loader."""
        if stage == "fit":
            self._loader = self._in_flight = None

    def _attach(self, trainer: pl.Trainer) -> TrainLoader | None:
        """The train loader, watched from now on; None if this run streams nothing."""
        if self._loader is not None and trainer.train_dataloader is self._loader:
            return self._loader
        found = [leaf for leaf in tree_leaves(trainer.train_dataloader) if isinstance(leaf, TrainLoader)]
        if len(found) > 1:
            raise DataError(
                f"found {len(found)} streams to train on, expected one: combine them in a MixtureDataModule"
            )
        if found and found[0] is not self._loader:
            self._loader, self._step, self._in_flight = found[0], trainer.global_step, None
            self._loader.watch(lambda: self._settle(trainer))
        return found[0] if found else None

    def _settle(self, trainer: pl.Trainer) -> None:
        """Commit the batch in flight if an optimizer step was applied since; also before a state is saved."""
        if self._loader is None or self._in_flight is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._loader.commit(self._in_flight)


def _begin_epoch(trainer: pl.Trainer) -> None:
    """Let Lightning count the epoch that follows a checkpoint of an epoch's last batch.

    Lightning 2.6 takes the old epoch as done, and then the new one as the old one, gone on with: it is not counted as
    begun. A checkpoint out of it would look like one of a finished epoch, and a third life count batches from 0.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if loop.restarted_mid_epoch and epochs.processed == epochs.ready:
        loop.reset_restart_stage()


def _recount(trainer: pl.Trainer, loader: TrainLoader) -> None:
    """Set Lightning's batch counters to what the loader's position amounts to.

    Unchanged ranks and batch size, with a checkpoint between optimizer steps, give the same numbers again.
    """
    loop = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    current: Any = progress.current
    epochs: Any = loop.epoch_progress.current
    if not loader.resumed:
        if current.processed:
            raise DataError(
                "the checkpoint is from the middle of an epoch but holds no data position: it was not "
                "made with this DataModule; start a new run from its weights"
            )
        return
    done = loader.batches_done
    if loader.epoch != epochs.processed:  # Lightning takes the saved epoch as finished
        rolled_over = progress.is_last_batch and current.completed < current.processed
        done = int(trainer.num_training_batches) if rolled_over else 0
        progress.is_last_batch = rolled_over
    finished = int(
        loop.epoch_loop.restarted_on_train_batch_end
    )  # Lightning adds the batch that was being finished
    shift = done - current.completed - finished
    total: Any = progress.total
    cut = (
        not finished and total.completed != total.ready
    )  # saved inside a batch; Lightning mends `current` alone
    if not shift and not cut:
        return
    if not lightning.__version__.startswith(tuple(f"{v}." for v in TESTED_LIGHTNING)):
        raise DataError(
            f"resuming with another number of ranks or samples per batch is tested with Lightning "
            f"{', '.join(TESTED_LIGHTNING)}, found {lightning.__version__}: resume with the former numbers "
            "or install a tested version"
        )
    for name in _COUNTERS:
        setattr(current, name, getattr(current, name) + shift)
        setattr(
            total, name, (total.completed if cut and name != "completed" else getattr(total, name)) + shift
        )
    if done % trainer.accumulate_grad_batches:
        log.warning(
            "resuming at batch %d, inside a window of %d accumulated batches: the first step sums fewer",
            done,
            trainer.accumulate_grad_batches,
        )
