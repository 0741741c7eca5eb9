"""Where a run lies, whether it has a past, and what it goes on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qm_lightning.errors import UserError
from qm_lightning.runtime import run_lock
from qm_lightning.runtime.find_checkpoint import RECORD_KEY
from qm_lightning.runtime.run_directory import RunDirectory, open_run_directory

LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_RESTART_COUNT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def train(run: RunDirectory, step: int = 10, name: str = "last") -> Path:
    """Leave what a training leaves."""
    run.checkpoints.mkdir(exist_ok=True)
    path = run.checkpoints / f"{name}.ckpt"
    record = {"run_id": run.run_id, "config": {"learning_rate": 0.1}}
    torch.save({"state_dict": {}, "global_step": step, RECORD_KEY: record}, path)
    (run.path / "metrics.csv").write_text("step,loss\n1,2.0\n")
    return path


def test_every_training_gets_a_version_and_an_id_of_its_own() -> None:
    first, second = open_run_directory(None, "image"), open_run_directory(None, "image")
    assert (str(first.path), str(second.path)) == ("runs/image/000", "runs/image/001")
    assert first.run_id != second.run_id
    assert json.loads((first.path / "run.json").read_text())["run_id"] == first.run_id


def test_a_past_is_never_overwritten_by_a_silent_start_from_zero() -> None:
    train(open_run_directory("mine", "image"))
    with pytest.raises(UserError, match=r"--ckpt_path last to go on.*--fresh"):
        open_run_directory("mine", "image")
    assert Path("mine/checkpoints/last.ckpt").is_file()


def test_a_resume_keeps_the_id_and_the_newest_step(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run_directory("mine", "image")
    train(run, 10, "step_00000010")
    newest = train(run, 20)
    again = open_run_directory("mine", "image", ckpt_path="last")
    assert (again.run_id, again.step, again.ckpt_path) == (run.run_id, 20, str(newest))
    assert "resume: step 20" in capsys.readouterr().out


def test_the_id_also_comes_from_the_checkpoint() -> None:
    run = open_run_directory("mine", "image")
    train(run)
    Path("mine/run.json").unlink()
    assert open_run_directory("mine", "image", ckpt_path="last").run_id == run.run_id


def test_last_without_a_directory_is_the_newest_version() -> None:
    for step in (5, 6):
        train(open_run_directory(None, "image"), step)
    again = open_run_directory(None, "image", ckpt_path="last")
    assert (str(again.path), again.step) == ("runs/image/001", 6)


def test_last_without_any_training_is_an_error() -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        open_run_directory(None, "image", ckpt_path="last")


def test_fresh_puts_the_past_aside_whole() -> None:
    run = open_run_directory("mine", "image")
    train(run)
    (run.path / "results.json").write_text("{}")
    again = open_run_directory("mine", "image", fresh=True)
    assert again.run_id != run.run_id
    assert again.ckpt_path is None
    kept = sorted(path.name for path in Path("mine/previous").glob("*/*"))
    assert kept == ["checkpoints", "metrics.csv", "results.json", "run.json"]
    assert not Path("mine/checkpoints").exists()


def test_fresh_and_a_checkpoint_contradict_each_other() -> None:
    train(open_run_directory("mine", "image"))
    with pytest.raises(UserError, match="--fresh and --ckpt_path"):
        open_run_directory("mine", "image", ckpt_path="last", fresh=True)


def test_weights_start_a_new_run() -> None:
    old = open_run_directory("old", "image")
    path = train(old)
    new = open_run_directory("new", "image", ckpt_path=str(path), policy="weights")
    assert (new.initial_weights, new.ckpt_path, new.step) == (str(path), None, 0)
    assert new.run_id != old.run_id


def test_a_policy_without_a_checkpoint_is_an_error() -> None:
    with pytest.raises(UserError, match="without --ckpt_path"):
        open_run_directory("new", "image", policy="weights")


def test_a_file_of_another_run_does_not_write_into_that_run() -> None:
    path = train(open_run_directory("old", "image"))
    new = open_run_directory(None, "image", ckpt_path=str(path))
    assert str(new.path) == "runs/image/000"
    assert new.step == 10


def test_a_requeued_job_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "4321", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    run = open_run_directory(None, "image")
    train(run, 40)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = open_run_directory(None, "image")
    assert (again.path, again.run_id, again.step) == (run.path, run.run_id, 40)
    monkeypatch.setenv("SLURM_JOB_ID", "4322")  # another job is another training
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert open_run_directory(None, "image").path != run.path


def test_a_requeued_job_that_had_saved_nothing_keeps_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "4321", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    run = open_run_directory("mine", "image", fresh=True)
    (run.path / "metrics.csv").write_text("step,loss\n1,2.0\n")
    again = open_run_directory("mine", "image", fresh=True)
    assert (again.run_id, again.ckpt_path) == (run.run_id, None)
    assert list(Path("mine/previous").glob("*/metrics.csv"))


def test_changed_settings_are_printed_on_resume(capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run_directory("mine", "image")
    train(run)
    again = open_run_directory("mine", "image", ckpt_path="last")
    again.write_config({"learning_rate": 0.5, "ckpt_path": "last"})
    assert "1 settings differ from the checkpoint's: learning_rate: 0.1 -> 0.5" in capsys.readouterr().out
    assert yaml.safe_load(Path("mine/config.yaml").read_text())["learning_rate"] == 0.5


def test_evaluation_takes_best_else_last_and_makes_nothing() -> None:
    with pytest.raises(UserError, match="no run in"):
        open_run_directory("mine", "image", verb="test")
    run = open_run_directory("mine", "image")
    last = train(run)
    assert open_run_directory("mine", "image", verb="test").ckpt_path == str(last)
    best = train(run, 7, "best")
    assert open_run_directory("mine", "image", verb="test").ckpt_path == str(best)
    assert open_run_directory("mine", "image", verb="test", ckpt_path="last").ckpt_path == str(last)


HOLDER = """
import sys
from pathlib import Path
from qm_lightning.runtime.run_lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_one_training_at_a_time_works_in_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path("mine")
    train(open_run_directory("mine", "image"))
    run_lock._held.pop(directory.resolve()).close()  # as if that process had ended
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    monkeypatch.setattr(run_lock.hold, "__defaults__", (0.5,))
    for options in ({"ckpt_path": "last"}, {"fresh": True}):
        with pytest.raises(UserError, match=r"another training works in mine.*choose another --run_dir"):
            open_run_directory("mine", "image", **options)  # type: ignore[arg-type]
    assert (directory / "metrics.csv").is_file(), "the past stays where it is"
    other.kill()
    other.wait()
    assert open_run_directory("mine", "image", ckpt_path="last").step == 10
