"""Two nodes, one training: each node has a launcher of its own, which knows of the other only by the network."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import ROOT, Job, newest_step, shipped, static
from tiny_experiment import tiny_experiment
from training_runs import free_port
from two_machines import TwoMachines

from qm_lightning.runtime.checkpoint_io import read_checkpoint

pytestmark = pytest.mark.timeout(1800)
ENDLESS = ["--trainer.max_steps", "100000", "--checkpoint_every", "1"]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_experiment(tmp_path_factory.mktemp("work"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    started = Job(tmp_path)
    yield started
    started.end()


@pytest.fixture
def machines(job: Job) -> Iterator[TwoMachines]:
    try:
        made = TwoMachines()
    except OSError as error:
        pytest.skip(str(error))
    yield made
    job.end()
    made.remove()


def last(run_dir: Path) -> dict[str, object]:
    return read_checkpoint(run_dir / "checkpoints/last.ckpt")


def start_both(job: Job, words: list[str], **env: str) -> None:
    """Start two launchers that meet by c10d, as a user would: `torchrun.sh` on both."""
    port = str(free_port())
    usual = {"NNODES": "2", "HEAD": "127.0.0.1", "PORT": port, "JOB": "j", "RESTARTS": "0"}
    for rank in (0, 1):
        job.start(shipped(words), **usual | env | {"IS_HOST": str(1 - rank)})


def test_two_launchers_make_one_training(fit: list[str], job: Job, tmp_path: Path) -> None:
    """Two nodes with batch 4 are one process with batch 8: weights to 1e-6, one run, every sample once."""
    # AdamW alone, at its default rate. Muon makes 2e-6 of a sum's last bit (docs/multi_node.md), and
    # AdamW's first steps divide it by gradients that are hardly larger: what differs is in proportion to the rate.
    adamw = ["--model.optimizer.muon_learning_rate", "0", "--model.optimizer.learning_rate", "0.001"]
    short = [*fit, *adamw, "--trainer.max_steps", "4", "--trainer.limit_val_batches", "1"]
    port, run_dir = free_port(), tmp_path / "two"
    for rank in (0, 1):
        words = [*short, "--data.batch_size", "4", "--run_dir", str(run_dir)]
        job.start(static(rank, port, words))
    # A process like the two: with other threads it would sum in another order.
    job.start([sys.executable, str(ROOT / "train.py"), *short, "--run_dir", str(tmp_path / "one")])
    assert [node.wait() for node in job.nodes] == [0, 0, 0], job.nodes[0].text
    one, two = last(tmp_path / "one"), last(run_dir)
    assert two["global_step"] == 4
    for name, weight in one["state_dict"].items():  # type: ignore[attr-defined]
        difference = weight.float() - two["state_dict"][name].float()  # type: ignore[index]
        assert difference.abs().max() < 1e-6, name


@pytest.mark.slow
def test_the_shipped_launch_file_meets_by_c10d(fit: list[str], job: Job, tmp_path: Path) -> None:
    start_both(job, [*fit, "--run_dir", str(tmp_path / "run")])
    assert [node.wait() for node in job.nodes] == [0, 0], job.nodes[0].text
    assert last(tmp_path / "run")["global_step"] == 8
    for noise in ("sync_dist", "eval mode", "deprecated", "weights_only"):
        assert noise not in job.nodes[0].text


@pytest.mark.slow
def test_an_elastic_job_goes_on_with_the_node_that_is_left(fit: list[str], job: Job, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start_both(
        job, [*fit, *ENDLESS, "--run_dir", str(run_dir)], NNODES="1:2", RESTARTS="3",
        RDZV_CONF="last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=2",
    )  # fmt: skip
    job.await_that(lambda: newest_step(run_dir) >= 3)
    first, second = job.nodes
    second.kill()
    reached = newest_step(run_dir)
    job.await_that(lambda: newest_step(run_dir) >= reached + 3)
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    assert "lost another rank" in first.text
    assert "resume: step" in first.text
    resumed = int(first.text.split("resume: step ")[1].split()[0])
    assert reached - 1 <= resumed <= reached + 1  # nothing trained was lost
    assert f"pre-empted: saved step {last(run_dir)['global_step']}" in first.text


@pytest.mark.slow
def test_two_machines_with_addresses_of_their_own(
    fit: list[str], job: Job, machines: TwoMachines, tmp_path: Path
) -> None:
    """As documented: the same line on both; the launch file finds out which one is the head."""
    for node in (0, 1):
        command = machines.on(node, shipped([*fit, "--run_dir", str(tmp_path / "run")]))
        job.start(command, NNODES="2", HEAD="node0", JOB="j", RESTARTS="0")
    assert [node.wait() for node in job.nodes] == [0, 0], job.nodes[1].text
    assert last(tmp_path / "run")["global_step"] == 8


@pytest.mark.slow
def test_the_doctor_shows_both_machines(
    fit: list[str], job: Job, machines: TwoMachines, tmp_path: Path
) -> None:
    for node in (0, 1):
        words = ["doctor", "--nodes", "--run_dir", str(tmp_path), "--data", fit[fit.index("--data.root") + 1]]
        job.start(machines.on(node, shipped(words)), NNODES="2", HEAD="node0", JOB="j", RESTARTS="0")
    assert [node.wait() for node in job.nodes] == [0, 0], job.nodes[1].text
    for fact in ("node0", "node1", "10.77.0.1", "10.77.0.2"):
        assert fact in job.nodes[0].text


@pytest.mark.slow
def test_a_pulled_cable_ends_both_machines_within_the_timeout(
    fit: list[str], job: Job, machines: TwoMachines, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for node in (0, 1):
        command = machines.on(node, shipped([*fit, *ENDLESS, "--run_dir", str(run_dir)]))
        job.start(
            command, NNODES="2", HEAD="node0", JOB="j", RESTARTS="0", QM_LIGHTNING_TIMEOUT_S="20",
        )  # fmt: skip
    job.await_that(lambda: newest_step(run_dir) >= 3)
    machines.pull_the_cable()
    pulled = time.monotonic()
    lost = [f"rank {rank} of 2 on node{rank} lost another rank" for rank in (0, 1)]
    job.await_that(lambda: all(line in node.text for line, node in zip(lost, job.nodes, strict=True)))
    assert 19 <= time.monotonic() - pulled < 60
    assert all(node.wait() != 0 for node in job.nodes)
    assert last(run_dir)["global_step"] >= 3


@pytest.mark.slow
def test_a_machine_without_the_others_names_the_missing_rank(
    fit: list[str], job: Job, tmp_path: Path
) -> None:
    """The second launcher starts a programme that never reaches the meeting."""
    port = free_port()
    job.start(static(0, port, [*fit, "--run_dir", str(tmp_path / "run")]), QM_LIGHTNING_TIMEOUT_S="15")
    job.start(static(1, port, ["--version"]))
    assert job.nodes[0].wait() != 0
    assert "rank 1 of 2 did not reach" in job.nodes[0].text
    assert not (tmp_path / "run/checkpoints").exists()
