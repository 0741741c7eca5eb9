"""`train.py test` shows its table in the run's own W&B page."""

import json
from pathlib import Path

import pytest
import wandb
from tiny_experiment import tiny_experiment
from wandb_stand_in import history, offline_files, records, run_ids

from qm_lightning.cli import main
from qm_lightning.runtime.publish_results import evaluation_table


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a run that W&B keeps on this disk, artifacts included."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.chdir(tmp_path)
    wandb.finish()  # what an earlier test of this process has left open would be gone on with
    return ["--logger.wandb", "true", "--logger.mode", "offline", "--logger.artifacts", "true"]


def test_a_training_and_its_evaluation_share_a_run(
    offline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = [*tiny_experiment(tmp_path / "work"), "--run_dir", "run", *offline]
    short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    assert main([*fit, *short]) == 0
    wandb.finish()  # as the end of the process does
    place = fit.index("--checkpoint_every")
    assert main(["test", *fit[1:place], *fit[place + 2 :]]) == 0
    run_id = json.loads(Path("run/run.json").read_text())["run_id"]
    assert capsys.readouterr().out.count(f"run {run_id}") == 2
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
