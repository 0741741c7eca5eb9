"""Options of small trainings on bytes."""

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parents[3] / "configs"
QUIET = [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--logger.wandb",
    "false",
]
SHORT = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]


@dataclass(frozen=True)
class Work:
    """Shards, backbone, and the options of a small training on them."""

    root: Path

    def options(self, run: str, experiment: str = "text_streaming") -> list[str]:
        sizes = ["dim", "local_dim"] if experiment == "text_streaming" else ["dim"]
        heads = ["heads", "local_heads"] if experiment == "text_streaming" else ["heads"]
        small = [item for name in sizes for item in (f"--model.prior.init_args.{name}", "32")]
        small += [item for name in heads for item in (f"--model.prior.init_args.{name}", "2")]
        return [
            "--config", str(CONFIGS / f"experiment/{experiment}.yaml"),
            "--run_dir", str(self.root / run),
            "--data.root", str(self.root / "data"),
            "--data.batch_size", "8",
            "--model.backbone.name_or_path", str(self.root / "backbone"),
            "--model.backbone.layers", "2",
            "--model.prior.init_args.depth", "1",
            *small, *QUIET, *SHORT,
        ]  # fmt: skip
