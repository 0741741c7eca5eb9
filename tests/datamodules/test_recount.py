"""Lightning's batch counters after a resize; another Lightning than the tested one is refused, not guessed at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import pytest
from lightning.pytorch.loops.progress import _BatchProgress

from datamodules.errors import DataError
from datamodules.shards.resume import TESTED_LIGHTNING, ExactResume, _recount


def case(batches_done: int, processed: int) -> tuple[Any, Any]:
    """A trainer that counts `processed` batches, and a loader that stands at another one."""
    progress = _BatchProgress()
    for counter in (progress.current, progress.total):
        counter.ready = counter.started = counter.processed = counter.completed = processed
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=progress, restarted_on_train_batch_end=False),
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
    )
    trainer = SimpleNamespace(fit_loop=loop, num_training_batches=13, accumulate_grad_batches=1)
    return trainer, SimpleNamespace(resumed=True, epoch=0, batches_done=batches_done)


def counts(trainer: Any) -> list[int]:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    names = ("ready", "started", "processed", "completed")
    return [getattr(counter, name) for counter in (progress.current, progress.total) for name in names]


def test_counters_are_those_of_the_new_numbers() -> None:
    trainer, loader = case(batches_done=6, processed=3)
    _recount(trainer, loader)
    assert counts(trainer) == [6] * 8


@pytest.mark.parametrize("moment", ["inside a batch", "at the end of a batch"])
def test_counters_of_a_checkpoint_between_batches_are_left_alone(moment: str) -> None:
    """Lightning 2.6 adds the batch that was being finished; one that was not begun to the end it must forget."""
    trainer, loader = case(batches_done=3, processed=3)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if moment == "inside a batch":
        progress.increment_ready()
        progress.increment_started()
        _recount(trainer, loader)
        assert counts(trainer)[4:] == [3] * 4
    else:
        progress.current.completed = progress.total.completed = 2
        trainer.fit_loop.epoch_loop.restarted_on_train_batch_end = True
        _recount(trainer, loader)
        progress.increment_completed()
    progress.reset_on_restart()  # as Lightning does next
    assert counts(trainer) == [3] * 8


def test_an_untested_lightning_is_refused_when_counters_must_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "__version__", "2.7.0")
    trainer, loader = case(batches_done=6, processed=3)
    with pytest.raises(DataError, match=r"tested with Lightning 2\.6, found 2\.7\.0"):
        _recount(trainer, loader)
    assert counts(trainer) == [3] * 8
    trainer, loader = case(batches_done=3, processed=3)
    _recount(trainer, loader)
    assert counts(trainer) == [3] * 8


def test_the_installed_lightning_is_tested() -> None:
    assert lightning.__version__.startswith(TESTED_LIGHTNING)


def test_a_state_without_a_position_is_refused() -> None:
    trainer, loader = case(batches_done=0, processed=3)
    loader.resumed = False
    with pytest.raises(DataError, match="holds no data position"):
        _recount(trainer, loader)


def test_a_batch_without_its_progress_is_refused() -> None:
    callback = ExactResume()
    callback._attach = lambda trainer: SimpleNamespace()  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(DataError, match="without the key 'progress'"):
        callback.on_train_batch_start(SimpleNamespace(), SimpleNamespace(), {"id": 1}, 0)  # type: ignore[arg-type]
