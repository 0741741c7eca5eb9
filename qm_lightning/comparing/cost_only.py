"""Measures the cost of a tested run again, without testing it again."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Trainer

from qm_lightning.commands.train import QuickMergeCLI
from qm_lightning.costs import measure_cost
from qm_lightning.results import write_json


class CostOnlyCLI(QuickMergeCLI):
    """``test`` on one batch that replaces the cost in results.json and nothing else."""

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
