"""The shipped NXTP experiment as a user types it, truncation, and one clear line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.shards.writer import write_shards
from datamodules.sources.image import DigitScenes
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("nxtp")
    for split, count in (("train", 16), ("val", 6), ("test", 6)):
        write_shards(root / "shards", split, DigitScenes(split, count, 0), shard_size=20, progress=False)
    model = small_vit(width=32, depth=2, heads=2)
    save_backbone(model, root / "backbone", preprocessing_of(model))
    return [
        "--config", str(ROOT / "configs/experiment/nxtp.yaml"),
        "--data.root", str(root / "shards"),
        "--data.batch_size", "4",
        "--model.backbone.name_or_path", str(root / "backbone"),
        "--model.backbone.layers", "2",
        "--model.prior.init_args.dim", "32",
        "--model.prior.init_args.heads", "2",
        "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
        "--trainer.max_steps", "6",
        "--trainer.val_check_interval", "6",
        "--model.optimizer.learning_rate", "0.02",
        "--model.optimizer.warmup_steps", "1",
        "--logger.wandb", "false",
    ]  # fmt: skip


def test_the_experiment(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deep = tmp_path / "deep"
    shown = ["--model.decoding.min_ratio", "0.0"]  # six steps teach little: show what there is
    assert main(["fit", *base, "--run_dir", str(deep)]) == 0
    assert main(["test", *base, "--run_dir", str(deep), *shown]) == 0
    metrics = json.loads((deep / "results.json").read_text())["metrics"]
    assert {
        "labels/f1",
        "labels/recall",
        "labels/precision",
        "labels/exact",
        "quality/nats",
    } <= metrics.keys()
    assert "quality/exact" not in metrics
    assert 0 < metrics["labels/f1"] <= 1
    assert main(["predict", *base, "--run_dir", str(deep), *shown]) == 0
    rows = [json.loads(line) for line in (deep / "predictions.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == list(range(6))
    assert all(set(row["prediction"]) <= set("0123456789, ") for row in rows)
    assert any(row["prediction"] for row in rows)
    assert all(0 < len(row["target"].split(", ")) <= 4 for row in rows)

    # A truncated decoder: the first block of two, then fine-tuned.
    shallow = tmp_path / "shallow"
    last = str(deep / "checkpoints/last.ckpt")
    cut = [
        "--model.prior.init_args.depth",
        "1",
        "--model.start_from",
        last,
        "--model.optimizer.learning_rate",
        "0",
        "--model.optimizer.muon_learning_rate",
        "0",
    ]
    assert main(["fit", *base, "--run_dir", str(shallow), *cut]) == 0
    first, second = (
        torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (deep, shallow)
    )
    kept = {k for k in first if not k.startswith("prior.trunk.blocks.1")}
    assert second.keys() == kept
    assert all(torch.equal(first[k], second[k]) for k in kept if k.startswith("prior."))


def test_the_label_prior_and_its_rival_differ_in_the_prior_alone() -> None:
    labels, digits = (
        yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text())["init_args"]
        for name in ("nxtp_image", "quickmerge_image")
    )
    for key in ("backbone", "merger", "optimizer"):
        assert labels[key] == digits[key]
    assert labels["prior"]["init_args"] == {**digits["prior"]["init_args"], "variant": "strict"}
    scenes, pictures = (
        yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())["init_args"]
        for name in ("digit_labels", "digits")
    )
    assert scenes == {**pictures, "targets": "digit_labels"}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--data.targets", "digits"], "expects label sets"),
        (["--model.prior.init_args.sep_id", "3"], "closes labels with token 10"),
        (["--model.prior.class_path", "qm_lightning.priors.ARPrior"], "LabelPrior"),
        (["--model.start_from", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str],
    expected: str,
    base: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *base, "--run_dir", str(tmp_path / "run"), *extra]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
