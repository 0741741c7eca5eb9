"""The main job as a user types it: fit, resume, test, predict; and one clear line for each mistake."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from datamodules.errors import DataError, outside_environment
from datamodules.shards.writer import write_shards
from datamodules.sources.image import DigitScenes
from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_llama, small_vit
from qm_lightning.cli import main
from qm_lightning.commands.train import require_readable, share_processor
from qm_lightning.errors import UserError
from qm_lightning.modules.multimodal import BackboneSet

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 48), ("val", 10), ("test", 10)):
        write_shards(root, split, DigitScenes(split, count, 0), shard_size=20, progress=False)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    model = small_vit(width=32, depth=2, heads=2)
    save_backbone(model, folder, preprocessing_of(model))
    return folder


def options(shards: Path, backbone: Path, run: Path) -> list[str]:
    return [
        "--config", str(ROOT / "configs/experiment/image.yaml"),
        "--run_dir", str(run),
        "--data.root", str(shards),
        "--data.batch_size", "8",
        "--model.backbone.name_or_path", str(backbone),
        "--model.backbone.layers", "2",
        "--model.prior.init_args.dim", "32",
        "--model.prior.init_args.depth", "1",
        "--model.prior.init_args.heads", "2",
        "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
        "--logger.mode", "offline",
    ]  # fmt: skip


def test_the_main_job(
    shards: Path,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    base = options(shards, backbone, run)
    length = ["--trainer.val_check_interval", "2", "--checkpoint_every", "2"]
    assert main(["fit", *base, *length, "--trainer.max_steps", "4"]) == 0
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints/best.ckpt").is_file()
    assert (run / "checkpoints/step_00000002.ckpt").is_file()
    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert weights["global_step"] == 4
    assert not [key for key in weights["state_dict"] if key.startswith("backbone.")]

    assert (
        main(["fit", *base, *length, "--trainer.max_steps", "4"]) == 2
    )  # history: no silent start from zero
    written = (run / "config.yaml").read_text()
    for other in (["--model.prior.init_args.dim", "16"], ["--model.merger", "ToMe"]):
        assert main(["fit", *base, "--ckpt_path", "last", *other]) == 2
        assert "does not fit the configured model" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == written  # that of the training, whatever was tried since
    assert main(["fit", *base, *length, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6

    assert main(["test", *base]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 6  # those of the training, whatever the command that tests would train for
    assert results["merger"] == "QuickMerge"
    assert results["samples"] == 10
    assert 0 < results["metrics"]["quality/nats"] < 10
    assert 1 < results["metrics"]["tokens/compression"] < 64
    assert results["cost"]["prior_flops_per_sample"] > 0

    assert main(["test", *base, "--trainer.limit_test_batches", "2", "--data.batch_size", "4"]) == 0
    assert json.loads((run / "results.json").read_text())["samples"] == 8

    assert main(["predict", *base]) == 0
    lines = (run / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["position"] for row in rows] == list(range(10))
    assert rows[0]["target"] == "0 2 7"  # the digits of the first test scene
    assert all(row["target"].replace(" ", "").isdigit() for row in rows)


RIVALS = (
    "ToMe", "UniformPool", "RandomPrune", "TopKPrune", "NoMerge", "ToFu", "PiToMe", "SCOPE", "TrimTokenator",
    "DynamicViT", "EViT",  # EViT: the backbone records what it reads, with no option for it
)  # fmt: skip


@pytest.mark.parametrize("merger", RIVALS)
def test_rivals_by_one_flag(
    merger: str, shards: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = options(shards, backbone, tmp_path / "run")
    flags = (
        []
        if merger == "NoMerge"
        else ["--model.merger.budget.class_path", "qm_lightning.merging.FixedBudget"]
    )
    assert main(["fit", *base, "--model.merger", merger, *flags, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--trainer.max_step", "3"], "max_step"),
        (["--trainer.max_steps", "many"], "max_steps"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--model.backbone.name_or_path", "missing/backbone"], "missing/backbone"),
        (["--model.merger.budget.compression", "0.5"], "at least 1"),
        (["--model.merger", "os.system"], "os.system"),
        (
            ["--model.merger", "TrimTokenator", "--model.merger.require_text", "true"],
            "model.context is not set",
        ),
        (["--ckpt_path", "last"], "no checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str],
    expected: str,
    shards: Path,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *options(shards, backbone, tmp_path / "run"), *extra]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line


def test_help_and_version_answer_without_torch() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "compare" in done.stdout
    assert time.perf_counter() - start < 5  # a machine under load; torch alone takes longer than this there
    assert main(["--version"]) == 0
    assert main(["fitt"]) == 2


def test_every_experiment_points_to_files_that_exist() -> None:
    found = sorted((ROOT / "configs/experiment").rglob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        for key in ("model", "data", "trainer", "logger"):
            assert (path.parent / yaml.safe_load(path.read_text())[key]).is_file()


def test_a_shard_folder_without_index_says_what_to_do(tmp_path: Path) -> None:
    from datamodules.shards.manifest import Manifest

    with pytest.raises(DataError, match="prepare"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("command", [["train.py", "fit"], ["-m", "datamodules", "index", "data"]])
def test_another_python_is_told_where_the_packages_are(command: list[str], tmp_path: Path) -> None:
    """README's `python train.py` in a Python without the environment's packages: -S leaves them out."""
    done = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "source .venv/bin/activate" in done.stderr


def test_a_bug_is_not_blamed_on_the_environment() -> None:
    with pytest.raises(ModuleNotFoundError):
        outside_environment(ModuleNotFoundError(name="qm_lightning.nothing"))


def small_text_backbone(folder: Path, max_tokens: int = 64) -> Path:
    save_backbone(small_llama(width=16, depth=1, heads=2, max_tokens=max_tokens), folder, None)
    return folder


def refused(*extra: str, run: Path, experiment: str, capsys: pytest.CaptureFixture[str]) -> str:
    config = str(ROOT / f"configs/experiment/{experiment}.yaml")
    assert main(["fit", "--config", config, "--run_dir", str(run), *extra]) == 2
    assert not (run / "config.yaml").exists()  # nothing was trained: nothing to go on from
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_data_that_the_backbone_cannot_read_is_refused_before_training(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, run = str(small_text_backbone(tmp_path / "text")), tmp_path / "run"
    place = "--model.backbone.name_or_path"
    line = refused(place, text, run=run, experiment="image", capsys=capsys)
    assert "backbone for text, but this data holds pictures" in line
    line = refused(place, str(backbone), run=run, experiment="text", capsys=capsys)
    assert "TextDataModule gives text" in line
    assert "is a backbone for image" in line
    line = refused(place, text, run=run, experiment="text", capsys=capsys)
    assert "data.context_length is 256" in line
    assert "give --data.context_length 64" in line


def test_the_backbones_own_tokenizer_reads_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes for a model that was trained on tokens would train without a word, on nonsense."""
    monkeypatch.chdir(tmp_path)
    folder = small_text_backbone(tmp_path / "own", max_tokens=256)
    named = Namespace(init_args=Namespace(name_or_path=str(folder)))
    config = Namespace({"model.init_args.backbone": named, "data.init_args.tokenizer": None})
    share_processor(config)
    assert config.data.init_args.tokenizer == "bytes"
    (folder / "tokenizer_config.json").write_text("{}")
    config.data.init_args.tokenizer = None
    share_processor(config)
    assert config.data.init_args.tokenizer == str(folder)
    arguments = ["--model.backbone.name_or_path", str(folder), "--data.tokenizer", "bytes"]
    line = refused(*arguments, run=tmp_path / "run", experiment="text", capsys=capsys)
    assert f"give --data.tokenizer {folder}" in line


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "lambda" not in shown
    assert "The main advantage is" not in shown


def test_each_part_of_a_mixture_fits_its_own_backbone(backbone: Path) -> None:
    """The pictures' backbone does not read the part of texts."""
    pictures = HFBackbone(str(backbone), layers=2)
    model: Any = SimpleNamespace(backbone=BackboneSet({"seen": pictures, "read": pictures}))
    data: Any = SimpleNamespace(
        parts={"seen": SimpleNamespace(modality="image"), "read": SimpleNamespace(modality="text")}
    )
    with pytest.raises(UserError, match=r"data\.parts\.read: .* gives text but .* is a backbone for image"):
        require_readable(model, data)
    data.parts["read"].modality = "paired"
    require_readable(model, data)
