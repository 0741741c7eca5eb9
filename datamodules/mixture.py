"""A weighted mixture of DataModules: one part per batch, so that shapes stay uniform."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from datamodules.base import ShardDataModule
from datamodules.errors import DataError
from datamodules.resumable import ResumableDataModule
from datamodules.shards.loader import StreamLoader
from datamodules.shards.mixing import MixtureTurns
from datamodules.shards.mixture import MixtureLoader
from datamodules.shards.stream import Batch


class MixtureDataModule(ResumableDataModule[MixtureLoader]):
    """Trains on several data sets at once; evaluates each by itself.

    Every batch is of one part and names it under `modality`; all ranks take the same part at the same time. Over a
    cycle of batches (the sum of the weights, as smallest whole numbers) each part comes exactly as often as its weight
    says. Parts are read pass by pass, each sample once a pass. Validation, test and prediction give one loader per
    part, in order.

    Args:
        parts: DataModules by name, with the same target vocabulary; each with its own batch size and workers. Their
            `tail` is ignored: training streams them endlessly, in full batches.
        weights: batches per cycle, relative to each other, by name; `None`: all alike.
        root: folder that the parts' relative roots start from; `None`: they are as they stand.
        seed: of the order of parts inside a cycle.
        epoch_batches: batches of an epoch; `None`: as many whole cycles as come nearest to all samples of all parts.

    Raises:
        DataError: weights and parts differ in their names, or parts in their target vocabulary.
    """

    modality: ClassVar[str] = "mixture"

    def __init__(
        self,
        parts: dict[str, ShardDataModule],
        weights: dict[str, float] | None = None,
        *,
        root: str | None = None,
        seed: int = 0,
        epoch_batches: int | None = None,
    ) -> None:
        super().__init__()
        if not parts:
            raise DataError("a mixture has no parts, expected at least one DataModule")
        weights = dict.fromkeys(parts, 1) if weights is None else weights
        if set(weights) != set(parts):
            raise DataError(
                f"the mixture has weights for {', '.join(sorted(weights))} and parts {', '.join(sorted(parts))}; "
                "give each part one weight"
            )
        self.parts = dict(parts)
        self.turns = MixtureTurns([weights[name] for name in self.parts], seed)
        self.vocab_size, self.eos_id = self._vocabulary()
        self._epoch_batches = epoch_batches
        for name, part in self.parts.items():
            part.part_name = name
            if root is not None and "://" not in part.root:
                part.root = str(Path(root) / part.root)

    def _vocabulary(self) -> tuple[int, int]:
        found = {name: (part.vocab_size, part.eos_id) for name, part in self.parts.items()}
        if len(set(found.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, (size, _) in found.items())
            raise DataError(
                f"the mixture's parts have target vocabularies of {sizes} ids; one prior needs the same for all: set "
                "targets=digit_text where targets are digits"
            )
        return next(iter(found.values()))

    # Loaders --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Forget the state of a former run."""
        super().setup(stage)
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup("mixture")  # the parts are not resumed by themselves

    def train_dataloader(self) -> MixtureLoader:
        """Batches of all parts in turn, resumable."""
        loaders = {name: part.endless_dataloader() for name, part in self.parts.items()}
        batches = self._epoch_batches or self._batches(loaders)
        return self.resume(MixtureLoader(loaders, self.turns, batches))

    def _batches(self, loaders: dict[str, StreamLoader]) -> int:
        """Whole cycles that take about as many batches as all parts have."""
        return max(1, round(sum(map(len, loaders.values())) / len(self.turns))) * len(self.turns)

    def val_dataloader(self) -> list[StreamLoader]:
        """One loader per part that has a validation split."""
        found = [part.val_dataloader() for part in self.parts.values()]
        return [loader for loader in found if isinstance(loader, StreamLoader)]

    def test_dataloader(self) -> list[StreamLoader]:
        """One loader per part."""
        return [part.test_dataloader() for part in self.parts.values()]

    def predict_dataloader(self) -> list[StreamLoader]:
        """One loader per part."""
        return [part.predict_dataloader() for part in self.parts.values()]

    # Targets and pictures -------------------------------------------------------------------------------

    def decode_targets(self, ids: Tensor) -> str:
        """Target tokens, long [T], as text."""
        return next(iter(self.parts.values())).decode_targets(ids)

    def describe_input(self, batch: Batch, i: int) -> Any:
        """Sample i for people, as its part describes it."""
        return self.parts[batch["modality"]].describe_input(batch, i)

    def fingerprint(self) -> str:
        """Identity of all shards of all parts, as hexadecimal SHA-256."""
        whole = ";".join(f"{name}:{part.fingerprint()}" for name, part in self.parts.items())
        return hashlib.sha256(whole.encode()).hexdigest()
