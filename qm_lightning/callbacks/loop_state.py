"""The few questions to Lightning's loops that have no public answer (lightning 2.6), in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def between_steps(trainer: Trainer) -> bool:
    """Whether no gradients are waiting: the last batch ended an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Whether validation runs right after the training batch that just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def training_ends(trainer: Trainer) -> bool:
    """Whether the training batch that just ended is the last one of the fit."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def logs_now(trainer: Trainer) -> bool:
    """Whether the current training batch is one whose metrics go to the loggers."""
    return trainer._logger_connector.should_update_logs


def time_fetching(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call back around every wait for the next training batch; Lightning's own profiling goes on."""
    loop = trainer.fit_loop.epoch_loop
    start, stop = type(loop)._on_before_fetch, type(loop)._on_after_fetch

    def timed_start() -> None:
        start(loop)
        before()

    def timed_stop() -> None:
        after()
        stop(loop)

    # The loop hands these to its data fetcher at the start of every epoch.
    loop._on_before_fetch, loop._on_after_fetch = timed_start, timed_stop  # type: ignore[method-assign]


def flush_step_metrics(trainer: Trainer) -> None:
    """Hand the current batch's metrics to the loggers.

    Lightning does so after ``on_train_batch_end``: a training that is left inside that hook loses the row.
    """
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def mark_validation_due(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint that was taken in validation repeat the validation from its first batch.

    The counters are those of a validation that stopped in its first batch, which Lightning goes back to.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    progress["total"].update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False
