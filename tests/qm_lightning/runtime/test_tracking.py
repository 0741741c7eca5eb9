"""W&B: one run for a training, however often it stops, with and without a network; never a question."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
import yaml
from training_runs import Attempt, run, write_shards
from wandb_stand_in import StandIn, configuration, history, offline_files, run_ids

from qm_lightning.runtime.wandb_run import wandb_mode

CONFIG = {"model": {"merger": {"class_path": "ToMe"}}, "trainer": {"max_steps": 12}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.shutdown()


def own_home(folder: Path) -> dict[str, str]:
    """No key, and no files of the user's."""
    return {
        "HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_CONFIG_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data"),
    }  # fmt: skip


def test_offline_a_stopped_run_on_two_ranks_is_one_run_with_the_whole_configuration(
    shards: Path, tmp_path: Path
) -> None:
    attempt = Attempt(
        world=2, config=CONFIG, tracking={"mode": "offline"}, env=own_home(tmp_path),
        trainer={"val_check_interval": 3}, signal_at=(4, 1),
    )  # fmt: skip
    first = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in first] == [75, 75], first[0].text
    assert "W&B offline: as asked" in first[0].text
    assert "upload with: wandb sync" in first[0].text
    again = replace(attempt, signal_at=None, ckpt_path="last")
    assert [o.code for o in run(again, shards, tmp_path / "run", tmp_path / "trace")] == [0, 0]

    run_id = json.loads((tmp_path / "run/run.json").read_text())["run_id"]
    assert run_ids(tmp_path / "run") == [run_id, run_id]  # two pieces of one run; rank 1 made none
    tree = configuration(offline_files(tmp_path / "run")[0])["config"]
    assert tree["model"] == CONFIG["model"]
    assert tree["trainer"] == CONFIG["trainer"]
    saved = list((tmp_path / "run/wandb").glob("offline-run-*/files/experiment/config.yaml"))
    assert len(saved) == 2
    assert yaml.safe_load(saved[0].read_text())["model"] == CONFIG["model"]

    rows = [row for piece in offline_files(tmp_path / "run") for row in history(piece)]
    losses = [row["trainer/global_step"] for row in rows if "train/loss/total" in row]
    assert losses == list(range(12))  # every step once, over the stop
    names = {name for row in rows for name in row}
    assert {"val/quality/nats", "train/gradient_norm", "train/learning_rate", "perf/step_s"} <= names


def test_online_a_resume_goes_on_in_the_same_run(server: StandIn, shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(
        config=CONFIG,
        tracking={"project": "p"},
        env=own_home(tmp_path) | server.environment,
        signal_at=(4, 0),
    )
    first = run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    assert first[0].code == 75, first[0].text
    assert "W&B online: logged in" in first[0].text
    again = replace(attempt, signal_at=None, ckpt_path="last")
    second = run(again, shards, tmp_path / "run", tmp_path / "trace")
    assert second[0].code == 0, second[0].text

    run_id = json.loads((tmp_path / "run/run.json").read_text())["run_id"]
    assert list(server.runs) == [run_id]
    told = server.runs[run_id]
    assert told["config"]["config"]["value"]["model"] == CONFIG["model"]
    losses = [row["trainer/global_step"] for row in told["history"] if "train/loss/total" in row]
    assert losses == list(range(12))
    assert [row["_step"] for row in told["history"]] == sorted({row["_step"] for row in told["history"]})
    assert yaml.safe_load(server.files[f"{run_id}/experiment/config.yaml"])["model"] == CONFIG["model"]
    # W&B writes a config.yaml of its own kind when a run ends: it must not go where ours is.
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"] == CONFIG["model"]


@pytest.mark.slow
def test_offline_pieces_are_stitched_by_sync(server: StandIn, shards: Path, tmp_path: Path) -> None:
    attempt = Attempt(tracking={"mode": "offline"}, env=own_home(tmp_path), signal_at=(4, 0))
    run(attempt, shards, tmp_path / "run", tmp_path / "trace")
    run(replace(attempt, signal_at=None, ckpt_path="last"), shards, tmp_path / "run", tmp_path / "trace")
    pieces = [str(file.parent) for file in offline_files(tmp_path / "run")]
    assert len(pieces) == 2
    program = Path(sys.executable).with_name("wandb")
    subprocess.run(
        [str(program), "sync", *pieces], env=os.environ | own_home(tmp_path) | server.environment,
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (told,) = server.runs.values()
    losses = [row["trainer/global_step"] for row in told["history"] if "train/loss/total" in row]
    assert losses == list(range(12))


def test_without_a_key_it_is_offline_and_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    mode, reason = wandb_mode()
    wandb.teardown()  # its helper process would serve every command that later tests start
    assert mode == "offline"
    assert "no W&B key" in reason
    assert wandb_mode("disabled") == ("disabled", "as asked")
    assert wandb_mode(None, {"WANDB_MODE": "dryrun"}) == ("offline", "as asked")


@pytest.mark.slow
def test_a_key_without_a_network_is_offline_after_a_bounded_wait(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:  # takes connections and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        silent = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "WANDB_API_KEY": "local-" + "a" * 40,
        }
        began = time.monotonic()
        attempt = Attempt(max_steps=2, tracking={}, env=own_home(tmp_path) | silent)
        outcome = run(attempt, shards, tmp_path / "run", tmp_path / "trace")[0]
    assert outcome.code == 0, outcome.text
    assert "W&B offline: W&B did not answer or refused the key" in outcome.text
    assert time.monotonic() - began < 60
    assert len(offline_files(tmp_path / "run")) == 1
