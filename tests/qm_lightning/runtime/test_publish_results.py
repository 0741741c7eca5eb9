"""`train.py test` shows its table in the run's own W&B page."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from tiny_experiment import ROOT, tiny_experiment
from wandb_stand_in import history, offline_files, records, run_ids

from qm_lightning.runtime.publish_results import evaluation_table

OFFLINE = ["--logger.wandb", "true", "--logger.mode", "offline", "--logger.artifacts", "true"]


def train_py(folder: Path, words: list[str]) -> str:
    """What `python train.py WORDS` prints; a process of its own, for W&B keeps settings for the life of one."""
    home = {
        name: str(folder / "wandb_home") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=[False, True], ids=["own service", "shared service"])
def _service(request: pytest.FixtureRequest) -> Iterator[None]:
    """W&B's helper process: each command's own, or one that all join, as under a parent that uses W&B itself."""
    wandb.teardown()
    if request.param:
        wandb.setup()
        assert "WANDB_SERVICE" in os.environ
    yield
    wandb.teardown()


@pytest.mark.usefixtures("_service")
def test_a_training_and_its_evaluation_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = [*tiny_experiment(tmp_path / "work"), "--run_dir", "run", *OFFLINE]
    printed = train_py(tmp_path, [*fit, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"])
    place = fit.index("--checkpoint_every")
    printed += train_py(tmp_path, ["test", *fit[1:place], *fit[place + 2 :]])
    run_id = json.loads(Path("run/run.json").read_text())["run_id"]
    assert printed.count(f"run {run_id}") == 2
    assert run_ids(Path("run")) == [run_id, run_id]
    training, evaluation = offline_files(Path("run"))

    kept = [r.artifact for r in records(training) if r.WhichOneof("record_type") == "artifact"]
    # W&B's own alias `latest` stays with the version that came last.
    assert [(a.name, sorted(a.aliases)) for a in kept if a.type == "model"] == [
        (f"checkpoint-{run_id}", ["best", "latest"]),
        (f"checkpoint-{run_id}", ["last", "latest"]),
    ]

    (row,) = history(evaluation)
    results = json.loads(Path("run/results.json").read_text())
    nats = results["metrics"]["quality/nats"]
    assert row["trainer/global_step"] == 2
    assert row["test/quality/nats"] == pytest.approx(nats)
    assert row["test/results._type"] == "table-file"
    assert row["test/merge.count"] == 4
    (table,) = evaluation.parent.glob("files/media/table/test/results*.json")
    shown = json.loads(table.read_text())
    values = dict(zip(shown["columns"], shown["data"][0], strict=True))
    assert values["merger"] == "QuickMerge"
    assert values["quality/nats"] == pytest.approx(nats)
    assert values["ms_per_sample"] == pytest.approx(results["cost"]["ms_per_sample"])


def test_runs_of_several_modalities_share_a_table() -> None:
    text = {"merger": "ToMe", "modality": "text", "metrics": {"quality/bits": 2.0}, "cost": {"ms_prior": 1.0}}
    image = {"merger": "ToMe", "modality": "image", "metrics": {"quality/nats": 1.0}, "cost": {}}
    columns, rows = evaluation_table([text, image])
    first, second = (dict(zip(columns, row, strict=True)) for row in rows)
    assert (first["modality"], first["quality/bits"], first["quality/nats"], first["ms_prior"]) == (
        "text",
        2.0,
        None,
        1.0,
    )
    assert (second["modality"], second["quality/bits"], second["quality/nats"], second["ms_prior"]) == (
        "image",
        None,
        1.0,
        None,
    )
