"""`train.py test` shows its table in the run's own W&B page."""

import json
from pathlib import Path

import pytest
from tiny_experiment import tiny_experiment
from wandb_stand_in import history, offline_files, run_ids

from qm_lightning.cli import main
from qm_lightning.runtime.publish_results import evaluation_table


def test_the_evaluation_goes_to_the_run_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.chdir(tmp_path)
    fit = [*tiny_experiment(tmp_path / "work"), "--run_dir", "run"]
    assert main([*fit, "--trainer.max_steps", "2"]) == 0
    without = fit.index("--checkpoint_every")
    assert (
        main(
            [
                "test",
                *fit[1:without],
                *fit[without + 2 :],
                "--logger.wandb",
                "true",
                "--logger.mode",
                "offline",
            ]
        )
        == 0
    )
    run_id = json.loads(Path("run/run.json").read_text())["run_id"]
    assert f"run {run_id}" in capsys.readouterr().out
    assert run_ids(Path("run")) == [run_id]
    (row,) = history(offline_files(Path("run"))[0])
    results = json.loads(Path("run/results.json").read_text())
    assert row["trainer/global_step"] == 2
    assert row["test/quality/nats"] == pytest.approx(results["metrics"]["quality/nats"])
    assert row["test/results._type"] == "table-file"
    assert row["test/merge.count"] == 4
    (table,) = Path("run/wandb").glob("offline-run-*/files/media/table/test/results*.json")
    shown = json.loads(table.read_text())
    values = dict(zip(shown["columns"], shown["data"][0], strict=True))
    assert values["merger"] == "QuickMerge"
    assert values["quality/nats"] == pytest.approx(results["metrics"]["quality/nats"])
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
