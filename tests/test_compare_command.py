"""``train.py compare`` as a user types it, with real trainings."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from datamodules.shards.writer import write_shards
from datamodules.sources.image import DigitScenes
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with shards and a backbone."""
    root = tmp_path_factory.mktemp("compare")
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        write_shards(root / "shards", split, DigitScenes(split, count, 0), shard_size=24, progress=False)
    model = small_vit(width=16, depth=2, heads=2)
    save_backbone(model, root / "backbone", preprocessing_of(model))
    return root


def compare(work: Path, mergers: str, *further: str) -> int:
    return main(
        [
            "compare",
            "--config", str(ROOT / "configs/experiment/image.yaml"),
            "--mergers", mergers,
            "--compressions", "2.37",
            "--seeds", "1",
            "--out", str(work / "out"),
            "--data.root", str(work / "shards"),
            "--data.batch_size", "8",
            "--model.backbone.name_or_path", str(work / "backbone"),
            "--model.backbone.layers", "2",
            "--model.prior.init_args.dim", "16",
            "--model.prior.init_args.depth", "1",
            "--model.prior.init_args.heads", "2",
            "--trainer.max_steps", "2",
            "--trainer.val_check_interval", "2",
            "--trainer.enable_model_summary", "false",
            "--logger.wandb", "false",
            *further,
        ]
    )  # fmt: skip


def rows(work: Path) -> list[dict[str, str]]:
    with (work / "out/report/runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_cell_fails_the_others_finish_and_are_not_run_again(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    # No float32 holds this mass, which only the first batch shows.
    assert compare(work, "NoMerge,QuickMerge(eps=1e300),InBackbone(merger=ToMe)") == 1
    printed = capsys.readouterr().out
    assert "QuickMerge(eps=1e300) 2.37x seed 0: exit code 1" in printed
    assert "without overflow" in printed
    assert "1 of 3 cells failed; the same command tries them again" in printed
    found = {row["method"]: row for row in rows(work)}
    assert set(found) == {"NoMerge", "InBackbone(merger=ToMe)"}
    assert float(found["NoMerge"]["tokens/kept_mean"]) == 64
    assert float(found["InBackbone(merger=ToMe)"]["tokens/kept_mean"]) == 27
    assert all(0 < float(row["quality/nats"]) < 10 for row in found.values())
    assert (work / "out/report/index.html").stat().st_size > 10_000
    (cell,) = (work / "out").glob("InBackbone*")
    assert len(list(cell.glob("report/examples/test-*.png"))) == 4

    # The figures are those of a test of its own.
    (command,) = [line for line in (cell / "log.txt").read_text().splitlines() if line.startswith("$ python")]
    before = json.loads((cell / "results.json").read_text())
    options = shell_words(command)[2:]
    options[0] = "test"
    options[options.index("--fresh") :] = ["--ckpt_path", "last"]
    assert main(options) == 0
    after = json.loads((cell / "results.json").read_text())
    assert after["metrics"] == pytest.approx(before["metrics"])
    capsys.readouterr()

    assert compare(work, "NoMerge,InBackbone(merger=ToMe)") == 0
    assert "2 cells: 2 finished, 0 to run" in capsys.readouterr().out


def shell_words(command: str) -> list[str]:
    import shlex

    return shlex.split(command.removeprefix("$ "), comments=True)


@pytest.mark.parametrize(
    ("mergers", "further", "message"),
    [
        ("ToMe", ["--compressions", "2,100"], "'ToMe' at 100x: compression=100 was asked of samples of 64"),
        ("ToMe", ["--model.backbone.name_or_path", "nowhere/at/all"], "does not exist"),
        (
            "TrimTokenator(require_text=true)",
            [],
            "require a text and will get none: model.context is not set",
        ),
        ("InBackbone(merger=NoMerge)", [], "expected a merger with a budget"),
        ("InBackbone(merger=EViT)", ["--compressions", "65"], "compression=65 was asked of samples of 64"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    mergers: str,
    further: list[str],
    message: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(work)
    assert compare(work, mergers, *further, "--out", str(work / "never")) == 2
    assert message in capsys.readouterr().err
    assert not (work / "never").exists()
