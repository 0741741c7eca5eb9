"""The command lines of a cell: train and test in one go, or measure the cost of a tested cell again."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Trainer

from qm_lightning.commands.train import QuickMergeCLI
from qm_lightning.costs import measure_cost
from qm_lightning.results import write_json


class CellCLI(QuickMergeCLI):
    """``fit`` and then the test of what it trained, without building everything a second time."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only fit: the parsers of the other verbs take longer to build than a short cell to train."""
        return {"fit": QuickMergeCLI.subcommands()["fit"]}

    def after_fit(self) -> None:
        """Test the last weights, which are those of ``last.ckpt``, and write results.json."""
        super().after_fit()
        self.trainer.loggers = []  # metrics.csv is the training's
        self.trainer.test(self.model, datamodule=self.datamodule)
        self.after_test()


class CostOnlyCLI(QuickMergeCLI):
    """``test`` on one batch that replaces the cost in results.json and nothing else."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only test."""
        return {"test": QuickMergeCLI.subcommands()["test"]}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that reads one batch."""
        return super().instantiate_trainer(limit_test_batches=1, **kwargs)

    def after_test(self) -> None:
        """Measure and write."""
        path = self.run.path / "results.json"
        results = json.loads(path.read_text())
        loader: Any = self.trainer.test_dataloaders
        batch = self.model.transfer_batch_to_device(next(iter(loader)), self.model.device, 0)
        results["cost"] = measure_cost(self.model, batch)
        write_json(path, results)
