"""A run directory that has moved keeps its best checkpoint."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qm_lightning.callbacks.checkpoints import BestCheckpoint, StepCheckpoints


def trained(directory: Path, score: float) -> BestCheckpoint:
    """The callback of a training whose best validation has been saved."""
    directory.mkdir(parents=True)
    callback = BestCheckpoint(directory, "val/quality/nats")
    file = directory / "best.ckpt"
    file.write_bytes(b"weights")
    value = torch.tensor(score)
    callback.best_model_path = callback.kth_best_model_path = str(file)
    callback.best_model_score = callback.kth_value = callback.best_k_models[str(file)] = value
    return callback


def test_a_worse_validation_does_not_take_the_file(tmp_path: Path) -> None:
    state = trained(tmp_path / "old/checkpoints", 0.5).state_dict()
    shutil.move(tmp_path / "old", tmp_path / "new")
    resumed = BestCheckpoint(tmp_path / "new/checkpoints", "val/quality/nats")
    resumed.load_state_dict(state)
    assert resumed.best_model_path == str(tmp_path / "new/checkpoints/best.ckpt")
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: decision)
    trainer: Any = SimpleNamespace(strategy=strategy)
    assert not resumed.check_monitor_top_k(trainer, torch.tensor(0.6))
    assert resumed.check_monitor_top_k(trainer, torch.tensor(0.4))


def test_another_runs_best_is_not_ours(tmp_path: Path) -> None:
    state = trained(tmp_path / "old/checkpoints", 0.5).state_dict()
    resumed = BestCheckpoint(tmp_path / "other/checkpoints", "val/quality/nats")
    resumed.load_state_dict(state)
    assert (resumed.best_model_path, resumed.best_k_models) == ("", {})
    assert (tmp_path / "old/checkpoints/best.ckpt").is_file()


def test_no_warning_of_a_moved_directory(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state = StepCheckpoints(tmp_path / "old", 10).state_dict()
    StepCheckpoints(tmp_path / "new", 10).load_state_dict(state)
    assert not [warning for warning in recwarn if "dirpath has changed" in str(warning.message)]
