"""The shipped image experiment, made small enough to train in a second: real shards, a real backbone."""

from pathlib import Path

from datamodules.shards.writer import write_shards
from datamodules.sources.image import DigitScenes
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit

ROOT = Path(__file__).parents[3]


def tiny_experiment(folder: Path) -> list[str]:
    """Write shards and a backbone into a folder; returns the command that trains on them.

    44 training samples are six batches of 8, for one process.
    """
    for split, count in (("train", 44), ("val", 10), ("test", 10)):
        write_shards(folder / "shards", split, DigitScenes(split, count, 0), shard_size=20, progress=False)
    model = small_vit(width=32, depth=2, heads=2)
    save_backbone(model, folder / "backbone", preprocessing_of(model))
    return [
        "fit",
        "--config", str(ROOT / "configs/experiment/image.yaml"),
        "--data.root", str(folder / "shards"),
        "--data.batch_size", "8",
        "--model.backbone.name_or_path", str(folder / "backbone"),
        "--model.backbone.layers", "2",
        "--model.prior.init_args.dim", "32",
        "--model.prior.init_args.depth", "1",
        "--model.prior.init_args.heads", "2",
        "--model.optimizer.warmup_steps", "2",
        "--trainer.max_steps", "8",
        "--trainer.val_check_interval", "4",
        "--trainer.log_every_n_steps", "1",
        "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
        "--checkpoint_every", "2",
        "--logger.wandb", "false",
    ]  # fmt: skip
