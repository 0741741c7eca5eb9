"""Draws what the merger does to a few samples while a run goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger


class MergePictures(Callback):
    """Merge pictures of the first samples of the validation and test shards.

    The files are ``STAGE-INDEX-KEY.png``, those of validation overwritten by each later round. Samples and
    names are the same in every run on the same shards, so that a report can lay methods side by side. Without
    a datamodule that has ``describe_input`` nothing is drawn.

    Args:
        directory: where the PNG files go.
        samples: pictures per round.
        every_n_steps: optimizer steps between two rounds, at least.
        rounds: rounds in validation, at most; keeps the time and W&B's storage bounded in long runs.
    """

    def __init__(
        self, directory: str | Path, samples: int = 4, every_n_steps: int = 200, rounds: int = 12
    ) -> None:
        self.directory = Path(directory)
        self.samples = samples
        self.every_n_steps = every_n_steps
        self.rounds = rounds
        self.drawn = 0
        self.last_step: int | None = None
        self._due = False

    def state_dict(self) -> dict[str, Any]:
        """Rounds drawn so far: a resumed run does not begin its allowance anew."""
        return {"drawn": self.drawn, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of the interrupted run."""
        self.drawn = state_dict["drawn"]
        self.last_step = state_dict["last_step"]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw a round in the first batch of each modality, when one is due."""
        if trainer.sanity_checking or batch_idx:
            return
        if dataloader_idx == 0:
            self._due = self._begin_round(trainer.global_step)
        if self._due and (dataloader_idx == 0 or "modality" in batch):
            self._draw(trainer, pl_module, batch, "val")

    def _begin_round(self, step: int) -> bool:
        """Whether a round is due in this validation; if so, it is counted."""
        if self.drawn >= self.rounds:
            return False
        if self.last_step is not None and step - self.last_step < self.every_n_steps:
            return False
        self.drawn += 1
        self.last_step = step
        return True

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch, of each modality."""
        if not batch_idx and (dataloader_idx == 0 or "modality" in batch):
            self._draw(trainer, pl_module, batch, "test")

    @torch.no_grad()
    def _draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: dict[str, Any],
        stage: Literal["val", "test"],
    ) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not hasattr(datamodule, "describe_input"):
            return
        from qm_lightning.pictures import merge_picture

        wanted = [i for i, real in enumerate(batch["valid"].tolist()) if real][: self.samples]
        try:
            inputs = [datamodule.describe_input(batch, i) for i in wanted]
        except NotImplementedError:  # a DataModule of one's own need not describe its inputs
            return
        with trainer.precision_plugin.forward_context():
            tokens, merged = pl_module.merge(batch)  # type: ignore[operator]  # QuickMergeModule's, or one like it
        folder = self._folder(batch)
        folder.mkdir(parents=True, exist_ok=True)
        paths, captions = [], []
        for i, described in zip(wanted, inputs, strict=True):
            figure = merge_picture(described, merged, i, tokens=tokens)
            key = re.sub(r"[^A-Za-z0-9_-]+", "_", batch["keys"][i])
            paths.append(folder / f"{stage}-{i:02d}-{key}.png")
            captions.append(
                f"{batch['keys'][i]}: {int(merged.mask[i].sum())} of {int(tokens.mask[i].sum())} tokens"
            )
            figure.savefig(paths[-1])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and paths:
                images = [str(path) for path in paths]
                name = "/".join([stage, *([batch["modality"]] if "modality" in batch else []), "merge"])
                logger.log_image(name, images, step=trainer.global_step, caption=captions)

    def _folder(self, batch: dict[str, Any]) -> Path:
        """Where a batch's pictures go: for one modality of several, beside that modality's results."""
        if "modality" not in batch:
            return self.directory
        run, modality = self.directory.parent.parent, str(batch["modality"])
        return run / modality / self.directory.relative_to(run)
