"""The real module through the real command line: straight on, or from a checkpoint in the middle of an epoch."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_experiment import tiny_experiment

from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *tiny_experiment(tmp_path_factory.mktemp("work")),
        "--model.prior.init_args.dropout",
        "0.2",
    ]


def same(a: Any, b: Any) -> bool:
    """Equal trees, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def figures(run: Path) -> dict[tuple[str, str], dict[str, str]]:
    """What was logged from step 2 on, without what a clock says."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = {k: v for k, v in row.items() if v and not k.startswith("perf/")}
            if int(row["step"]) >= 2:
                rows[row["step"], "val" if row.get("val/quality/nats") else "train"] = values
    return rows


def test_the_main_module_resumes_bit_for_bit(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*base, "--run_dir", "straight"]) == 0
    # 44 samples are six batches of 8: step 2 lies inside the first epoch.
    middle = "straight/checkpoints/step_00000002.ckpt"
    assert main([*base, "--run_dir", "resumed", "--ckpt_path", middle]) == 0
    ends = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("straight", "resumed")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 8
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert same(ends[0][key], ends[1][key]), key
    assert any("rho" in name for name in ends[0]["state_dict"])
    expected, found = (figures(Path(run)) for run in ("straight", "resumed"))
    assert len(expected) == 8  # six steps, two validations
    assert found == expected
    assert "settings differ" not in capsys.readouterr().out


def test_explicit_values_win_over_stored_ones_and_are_printed(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*base, "--run_dir", "run", "--trainer.max_steps", "2"]) == 0
    capsys.readouterr()
    change = ["--model.optimizer.learning_rate", "0.25", "--trainer.max_steps", "4"]
    assert main([*base, *change, "--run_dir", "run", "--ckpt_path", "last"]) == 0
    text = capsys.readouterr().out
    assert "2 settings differ" in text
    assert "learning_rate: 0.004 -> 0.25" in text
    assert "new schedule from step 2 on (learning rate 0.004 -> 0.25)" in text
    groups = torch.load("run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.005, 0.25, 0.25]  # Muon's, and AdamW's two


@pytest.mark.slow
def test_weights_alone_start_a_run_of_their_own(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*base, "--run_dir", "old", "--trainer.max_steps", "2"]) == 0
    new = ["--run_dir", "new", "--ckpt_path", "old/checkpoints/last.ckpt", "--resume_policy", "weights"]
    assert main([*base, *new, "--trainer.max_steps", "2"]) == 0
    assert "everything else from zero" in capsys.readouterr().out
    old, fresh = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("old", "new"))
    assert fresh["global_step"] == 2
    assert old["qm_lightning"]["run_id"] != fresh["qm_lightning"]["run_id"]


@pytest.mark.slow
def test_a_checkpoint_behind_another_backbone_is_refused(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*base, "--run_dir", "run", "--trainer.max_steps", "2"]) == 0
    torch.manual_seed(1)
    other = small_vit(width=32, depth=2, heads=2)
    save_backbone(other, tmp_path / "other", preprocessing_of(other))
    again = [
        "--model.backbone.name_or_path",
        str(tmp_path / "other"),
        "--run_dir",
        "run",
        "--ckpt_path",
        "last",
    ]
    assert main([*base, *again]) == 2
    assert "has other weights" in capsys.readouterr().err
