"""A machine is taken away, a rank is lost, a disk is full: how the training ends, and how soon."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import Attempt, run, traced, write_shards

from qm_lightning.runtime.checkpoint_io import read_checkpoint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `scontrol` that writes down what it is asked; returns the file."""
    log, tool = tmp_path / "asked.txt", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    tool.chmod(0o755)
    return log


def since_the_last_step(trace: Path) -> float:
    """Seconds since a rank last wrote down a step: how long leaving took, without what starting took."""
    return time.time() - max(path.stat().st_mtime for path in trace.iterdir())


def slurm(scontrol: Path, **settings: object) -> Attempt:
    path = f"{scontrol.parent / 'bin'}:{os.environ['PATH']}"
    return Attempt(launcher="slurm", world=2, env={"PATH": path}, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_one_rank_brings_all_to_the_same_step(rank: int, shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(world=2, max_steps=1000, signal_at=(4, rank))
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [75, 75]
    assert f"saved step 5 to {tmp_path}/run/checkpoints/last.ckpt, exit code 75" in outcomes[0].text
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 5
    assert [len(traced(tmp_path / "trace", r)) for r in (0, 1)] == [5, 5]
    assert since_the_last_step(tmp_path / "trace") < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_of_the_job(number: int, shards: Path, tmp_path: Path) -> None:
    """Data workers and W&B's service get it too: the step ends, the save is whole, the exit code says so."""
    tracking = {"wandb": True, "mode": "offline"}
    attempt = Attempt(workers=2, signal_at=(4, 0), signal=number, to_all=True, tracking=tracking)
    outcome = run(attempt, shards, tmp_path / "run", tmp_path / "trace")[0]
    assert outcome.code == 75, outcome.text
    assert "pre-empted: saved step 5" in outcome.text
    assert "Traceback" not in outcome.text
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len([row for row in rows[1:] if row]) >= 5  # W&B's service may have ended with rows unwritten
    again = replace(attempt, signal_at=None, ckpt_path="last")
    outcome = run(again, shards, tmp_path / "run", tmp_path / "trace")[0]
    assert outcome.code == 0, outcome.text
    assert [line["step"] for line in traced(tmp_path / "trace")] == list(range(12))


@pytest.mark.parametrize("world", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(world: int, shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(world=world, workers=1, signal_at=(4, 0), signal=signal.SIGINT, to_all=True)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [130] * world, outcomes[0].text
    assert "interrupted: saved step 5" in outcomes[0].text
    again = replace(attempt, signal_at=None, ckpt_path="last")
    assert run(again, shards, tmp_path / "run", tmp_path / "trace")[0].code == 0
    assert [line["step"] for line in traced(tmp_path / "trace")] == list(range(12))


@pytest.mark.parametrize(("after_s", "code"), [(0.2, 130), (1.2, 1)])
def test_a_second_ctrl_c_ends_at_once(after_s: float, code: int, shards: Path, tmp_path: Path) -> None:
    """Unless it comes so soon that it is the same key, handed on by torchrun."""
    attempt = Attempt(signal_at=(4, 0), signal=signal.SIGINT, signal_again_after_s=after_s)
    outcome = run(attempt, shards, tmp_path / "run", tmp_path / "trace")[0]
    assert outcome.code == code, outcome.text
    assert (tmp_path / "run/checkpoints/last.ckpt").exists() == (code == 130)


@pytest.mark.slow
def test_metrics_of_the_last_step_are_not_lost(shards: Path, tmp_path: Path) -> None:
    run(Attempt(signal_at=(4, 0)), shards, tmp_path / "run", tmp_path / "trace")
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len([row for row in rows[1:] if row]) >= 5


def test_a_time_limit_requeues_and_the_next_turn_goes_on_by_itself(
    scontrol: Path, shards: Path, tmp_path: Path
) -> None:
    attempt = slurm(scontrol, signal_at=(4, 1), signal=signal.SIGUSR1, fresh=True)
    first = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in first] == [75, 75], first[0].text
    assert scontrol.read_text() == "requeue 4321\n"
    # The same command line, as SLURM starts it again: it even says --fresh, which was for the first turn.
    again = replace(attempt, signal_at=None, env=attempt.env | {"SLURM_RESTART_COUNT": "1"})
    second = run(again, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in second] == [0, 0], second[0].text
    assert "resume: step 5" in second[0].text
    assert [line["step"] for line in traced(tmp_path / "trace")] == list(range(12))


@pytest.mark.slow
def test_sigterm_does_not_ask_for_another_turn(scontrol: Path, shards: Path, tmp_path: Path) -> None:
    outcomes = run(slurm(scontrol, signal_at=(4, 1)), shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [75, 75]
    assert not scontrol.exists()


@pytest.mark.slow
def test_a_scheduler_that_refuses_is_reported(scontrol: Path, shards: Path, tmp_path: Path) -> None:
    tool = scontrol.parent / "bin/scontrol"
    tool.write_text("#!/bin/sh\necho 'Requested operation is disabled' >&2\nexit 1\n")
    attempt = slurm(scontrol, signal_at=(4, 0), signal=signal.SIGUSR1)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [75, 75]
    assert "scontrol requeue 4321 failed: Requested operation is disabled" in outcomes[0].text


def test_a_killed_rank_ends_the_others_at_once(shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(world=2, max_steps=1000, signal_at=(4, 1), signal=signal.SIGKILL)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert outcomes[1].code == -signal.SIGKILL
    assert outcomes[0].code not in (0, 75)
    assert since_the_last_step(tmp_path / "trace") < 20


def test_a_silent_rank_ends_the_others_within_the_timeout(shards: Path, tmp_path: Path) -> None:
    """A stopped process answers nothing, as one behind a pulled cable."""
    attempt = Attempt(world=2, max_steps=1000, stop_at=(4, 1), timeout_s=6)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace", wait_for=1)
    assert outcomes[0].code == 1
    assert 5 <= since_the_last_step(tmp_path / "trace") < 20


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(shards: Path, tmp_path: Path) -> None:
    first = run(Attempt(max_steps=4), shards, tmp_path / "run", tmp_path / "trace")
    assert first[0].code == 0
    full = Attempt(max_steps=8, ckpt_path="last", file_limit=3000, checkpoint_every=2)
    second = run(full, shards, tmp_path / "run", tmp_path / "trace")
    assert second[0].code == 2, second[0].text
    assert "could not save" in second[0].error
    assert "go on with --ckpt_path last" in second[0].error
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 4
    third = run(Attempt(max_steps=8, ckpt_path="last"), shards, tmp_path / "run", tmp_path / "trace")
    assert third[0].code == 0
    assert "resume: step 4" in third[0].text


def test_a_disk_that_runs_full_in_training(small_disk: Path, shards: Path, tmp_path: Path) -> None:
    """No stand-in: a file system without room. What was saved before stays, and the training goes on from there."""
    attempt = Attempt(max_steps=12, checkpoint_every=2, trainer={"limit_val_batches": 0})
    full = replace(attempt, fill_disk_at=5)
    first = run(full, shards, small_disk / "run", tmp_path / "trace")
    assert first[0].code == 2, first[0].text
    assert "disk full: 0.0 MiB free" in first[0].text
    assert "the one before it is kept" in first[0].error
    assert len(traced(tmp_path / "trace")) == 12  # it trained to its end, in the hope of room
    last = small_disk / "run/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 4
    assert not [path for path in last.parent.iterdir() if "tmp" in path.name]

    again = replace(attempt, ckpt_path="last")
    blocked = run(again, shards, small_disk / "run", tmp_path / "trace")
    assert blocked[0].code == 2, blocked[0].text
    assert f"cannot write in {small_disk / 'run'}: No space left on device" in blocked[0].error

    (small_disk / "run/filler").unlink()
    third = run(again, shards, small_disk / "run", tmp_path / "trace")
    assert third[0].code == 0, third[0].text
    assert "resume: step 4" in third[0].text
    rows = (small_disk / "run/metrics.csv").read_text().splitlines()
    steps = [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]]
    assert steps == [str(step) for step in range(12)]


def test_a_killed_training_misses_no_row_of_metrics(shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(checkpoint_every=2, trainer={"limit_val_batches": 0})
    kill = replace(attempt, signal_at=(7, 0), signal=signal.SIGKILL)
    assert run(kill, shards, tmp_path / "run", tmp_path / "trace")[0].code == -signal.SIGKILL
    again = replace(attempt, ckpt_path="last")
    assert run(again, shards, tmp_path / "run", tmp_path / "trace")[0].code == 0
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    steps = [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]]
    assert steps == [str(step) for step in range(12)]


def test_pre_emption_on_a_full_disk_does_not_claim_a_save(shards: Path, tmp_path: Path) -> None:
    run(Attempt(max_steps=4), shards, tmp_path / "run", tmp_path / "trace")
    full = Attempt(max_steps=9, ckpt_path="last", file_limit=3000, signal_at=(2, 0))
    second = run(full, shards, tmp_path / "run", tmp_path / "trace")
    assert second[0].code == 75
    assert "pre-empted: could not save" in second[0].text
    assert "saved step" not in second[0].text


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_no_number_ends_on_every_rank(world: int, shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(world=world, nan_at=(3, world - 1), checkpoint_every=2)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [2] * world
    assert all("the loss is not finite" in o.error for o in outcomes)
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(world=2, absent=1, timeout_s=2)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace", wait_for=1)
    assert outcomes[0].code == 2
    assert "rank 1 of 2 did not reach" in outcomes[0].error


def test_node_local_directories_are_refused(shards: Path, tmp_path: Path) -> None:
    """Rank 1 looks into a folder of its own: it must not train from zero beside a resumed rank 0."""
    run(Attempt(world=2, max_steps=2), shards, tmp_path / "run", tmp_path / "trace")
    attempt = Attempt(world=2, max_steps=4, ckpt_path="last", blind=1)
    outcomes = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [2, 2]
    assert "rank 1 does not see" in outcomes[0].error


def test_ranks_that_differ_do_not_start(shards: Path, tmp_path: Path) -> None:
    outcomes = run(Attempt(world=2, odd=1), shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [2, 2]
    assert "the ranks differ (config: rank 0 has" in outcomes[0].error
    assert not traced(tmp_path / "trace")
