"""`last` is the newest checkpoint that loads."""

import os
from pathlib import Path

import pytest
import torch

from qm_lightning.errors import UserError
from qm_lightning.runtime.find_checkpoint import RECORD_KEY, has_history, resolve_checkpoint


def save(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.zeros(9)}, "global_step": step, RECORD_KEY: {"run_id": "ab"}}, path)
    return path


def test_last_is_the_newest_step_whatever_the_file_times(tmp_path: Path) -> None:
    newest = save(tmp_path / "checkpoints/step_00000020.ckpt", 20)
    save(tmp_path / "checkpoints/step_00000010.ckpt", 10)
    save(tmp_path / "checkpoints/last.ckpt", 15)  # the job died before it could write last
    os.utime(newest, (1, 1))
    found = resolve_checkpoint(tmp_path, "last")
    assert (found.path, found.step, found.record) == (newest, 20, {"run_id": "ab"})


def test_of_equal_steps_last_wins(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints/step_00000020.ckpt", 20)
    last = save(tmp_path / "checkpoints/last.ckpt", 20)
    assert resolve_checkpoint(tmp_path, "last").path == last


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_broken_newest_is_reported_and_passed_over(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save(tmp_path / "checkpoints/step_00000010.ckpt", 10)
    bad = save(tmp_path / "checkpoints/last.ckpt", 20)
    data = bytearray(bad.read_bytes())
    if damage == "noise":
        place = data.find(b"\0" * 36)  # inside the tensor: only reading it all finds this
        data[place : place + 8] = os.urandom(8)
    bad.write_bytes({"empty": b"", "cut": bytes(data[: len(data) // 2]), "noise": bytes(data)}[damage])
    assert resolve_checkpoint(tmp_path, "last").path == good
    text = capsys.readouterr().err
    assert "passed over" in text
    assert str(bad) in text


def test_best_and_a_path_are_taken_at_their_word(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints/last.ckpt", 20)
    best = save(tmp_path / "checkpoints/best.ckpt", 12)
    elsewhere = save(tmp_path / "elsewhere.ckpt", 3)
    assert resolve_checkpoint(tmp_path, "best").path == best
    assert resolve_checkpoint(tmp_path, str(elsewhere)).step == 3
    elsewhere.write_bytes(b"")
    with pytest.raises(UserError, match="is broken"):
        resolve_checkpoint(tmp_path, str(elsewhere))


def test_nothing_that_loads_is_an_error_not_a_start_from_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        resolve_checkpoint(tmp_path, "last")
    with pytest.raises(UserError, match="no checkpoint at"):
        resolve_checkpoint(tmp_path, "best")


def test_history(tmp_path: Path) -> None:
    assert not has_history(tmp_path)
    (tmp_path / "metrics.csv").touch()
    assert has_history(tmp_path)
