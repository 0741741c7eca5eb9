"""What one sees in the terminal: the bar's figures, what is trained and what is frozen."""

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from rich.console import Console
from torch import nn

from qm_lightning import terminal
from qm_lightning.callbacks import progress_bar
from qm_lightning.callbacks.model_summary import summary_table
from qm_lightning.callbacks.progress_bar import TrainingBar
from qm_lightning.commands.train import terminal_callbacks
from qm_lightning.runtime.known_warnings import silence_false_alarms


def test_the_bar_shows_the_loss_and_not_the_runs_id(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = {"train/loss/total": torch.tensor(2.5), "train/loss/target": torch.tensor(2.0)}
    trainer: Any = SimpleNamespace(training=True, callback_metrics=logged, max_epochs=-1)
    monkeypatch.setattr(progress_bar, "logs_now", lambda _: True)
    bar = TrainingBar()
    assert bar.get_metrics(trainer, nn.Module()) == {"loss": 2.5}  # type: ignore[arg-type]
    trainer.training, trainer.callback_metrics = False, {"val/quality/nats": torch.tensor(1.5)}
    assert bar.get_metrics(trainer, nn.Module()) == {"loss": 2.5, "val nats": 1.5}  # type: ignore[arg-type]


def test_between_logged_steps_no_figure_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "logs_now", lambda _: False)
    trainer: Any = SimpleNamespace(training=True)  # without callback_metrics: asking for them would raise
    assert TrainingBar().get_metrics(trainer, nn.Module()) == {}  # type: ignore[arg-type]


def test_an_open_number_of_epochs_is_not_minus_two() -> None:
    bar = TrainingBar()
    bar._trainer = SimpleNamespace(max_epochs=-1)  # type: ignore[assignment]
    assert bar._get_train_description(3).strip() == "Epoch 3"
    bar._trainer = SimpleNamespace(max_epochs=5)  # type: ignore[assignment]
    assert bar._get_train_description(3).strip() == "Epoch 3/4"


@pytest.mark.parametrize(
    ("step", "max_steps", "accumulate", "done", "want"),
    [
        (0, 100, 1, 0, 38),  # a whole epoch
        (56, 77, 1, 18, 38),  # resumed in its middle, 21 steps are left
        (69, 77, 1, 31, 38),
        (76, 77, 1, 38, 1),  # the epoch before had 38; of this one a single step is left
        (70, 77, 2, 4, 18),
        (5, -1, 1, 5, 38),
    ],
)
def test_the_bar_ends_where_the_training_ends_also_after_a_resume(
    step: int, max_steps: int, accumulate: int, done: int, want: int
) -> None:
    progress = SimpleNamespace(current=SimpleNamespace(ready=done))
    bar = TrainingBar()
    bar._trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=max_steps, global_step=step, accumulate_grad_batches=accumulate, num_training_batches=38,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip
    assert bar.total_train_batches == want


def test_the_summary_splits_trained_and_frozen() -> None:
    module = nn.Module()
    module.backbone, module.prior, module.metrics = nn.Linear(3, 4), nn.Linear(4, 2), nn.Identity()
    module.backbone.requires_grad_(False)
    text = io.StringIO()
    Console(file=text, width=100).print(summary_table(module))
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in text.getvalue().splitlines()]
    assert ["part", "class", "trained", "frozen"] in rows
    assert ["backbone", "Linear", "0", "16"] in rows
    assert ["prior", "Linear", "10", "0"] in rows
    assert ["total", "10", "16"] in rows
    assert "metrics" not in text.getvalue()


def test_switches_and_own_callbacks_are_respected() -> None:
    assert [type(c).__name__ for c in terminal_callbacks({})] == ["TrainingBar", "TrainedAndFrozen"]
    assert terminal_callbacks({"enable_progress_bar": False, "enable_model_summary": False}) == []
    assert terminal_callbacks({"callbacks": [RichProgressBar(), ModelSummary()]}) == []


def test_advertisements_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    silence_false_alarms()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=logger.name):
        logger.info("💡 Tip: For seamless cloud logging and experiment tracking, try installing something")
        logger.info("GPU available: False, used: False")
    assert [record.getMessage() for record in caplog.records] == ["GPU available: False, used: False"]


def test_lines_are_folded_to_a_terminal_and_not_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert terminal.console().width == 200
    monkeypatch.setenv("COLUMNS", "90")
    assert terminal.console().width == 90
