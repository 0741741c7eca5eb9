"""Options of small trainings on bytes."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from qm_lightning.cli import main

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

    def options(self, run: str) -> list[str]:
        """The shipped streaming experiment, small."""
        local = ["--model.prior.init_args.local_dim", "32", "--model.prior.init_args.local_heads", "2"]
        return [*self._common(run, CONFIGS / "experiment/text_streaming.yaml", "data"), *local]

    def conditioning_options(self, run: str) -> list[str]:
        """QuickMerge on the context, its continuation as target."""
        file = self.root / "conditioning.yaml"
        parts = {"model": "model/quickmerge_image.yaml", "trainer": "trainer/cpu.yaml"}
        config: dict[str, object] = {name: str(CONFIGS / path) for name, path in parts.items()}
        config["data"] = {"class_path": "datamodules.TextDataModule"}
        file.write_text(yaml.safe_dump(config))
        return self._common(run, file, "pairs")

    def mixture_run(self) -> Path:
        """A trained mixture, made at the first call."""
        if not (self.root / "mixture/checkpoints/last.ckpt").exists():
            assert main(["fit", *self.mixture_options("mixture")]) == 0
        return self.root / "mixture"

    def mixture_options(self, run: str) -> list[str]:
        """One prior for two parts, which are the same text."""
        text = {"root": str(self.root / "data"), "batch_size": 8, "targets": "text", "context_length": 96}
        backbone = {"name_or_path": str(self.root / "backbone"), "layers": 2}
        budget = {"class_path": "qm_lightning.merging.FixedBudget", "init_args": {"compression": 2.0}}
        path = {
            "backbone": {"class_path": "qm_lightning.backbones.HFBackbone", "init_args": backbone},
            "merger": {"class_path": "qm_lightning.merging.UniformPool", "init_args": {"budget": budget}},
        }
        prior = {"dim": 32, "depth": 1, "heads": 2}
        names = ("first", "second")
        parts = {name: {"class_path": "datamodules.TextDataModule", "init_args": text} for name in names}
        config = {
            "trainer": str(CONFIGS / "trainer/cpu.yaml"),
            "data": {"class_path": "datamodules.MixtureDataModule", "init_args": {"parts": parts}},
            "model": {
                "class_path": "qm_lightning.modules.MultimodalModule",
                "init_args": {
                    "paths": dict.fromkeys(names, path),
                    "prior": {"class_path": "qm_lightning.priors.ARPrior", "init_args": prior},
                },
            },
        }
        file = self.root / "mixture.yaml"
        file.write_text(json.dumps(config))
        return ["--config", str(file), "--run_dir", str(self.root / run), *QUIET, *SHORT]

    def _common(self, run: str, config: Path, data: str) -> list[str]:
        small = ["--model.prior.init_args.dim", "32", "--model.prior.init_args.heads", "2"]
        return [
            "--config", str(config),
            "--run_dir", str(self.root / run),
            "--data.context_length", "96",
            "--data.root", str(self.root / data),
            "--data.batch_size", "8",
            "--model.backbone.name_or_path", str(self.root / "backbone"),
            "--model.backbone.layers", "2",
            "--model.prior.init_args.depth", "1",
            *small, *QUIET, *SHORT,
        ]  # fmt: skip
