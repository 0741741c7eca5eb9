"""What every DataModule with a resumable train loader does about its state."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from datamodules.shards.loader import StreamLoader
from datamodules.shards.mixture import MixtureLoader
from datamodules.shards.resume import ExactResume

Loader = TypeVar("Loader", StreamLoader, MixtureLoader)


class ResumableDataModule(pl.LightningDataModule, Generic[Loader]):
    """Keeps the train loader's state, whether Lightning loads it before or after the loader is made."""

    def __init__(self) -> None:
        super().__init__()
        self._train: Loader | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Forget the state of a former run."""
        self._state = self._train = None

    def resume(self, loader: Loader) -> Loader:
        """Take a new train loader into use, at the position that is known so far."""
        reloading = self._train is not None and self.trainer is not None and self.trainer.training
        state = self._train.state_dict() if self._train is not None and reloading else self._state
        if state is not None:
            loader.load_state_dict(state)
        self._train = loader
        return loader

    def fingerprint(self) -> str:
        """Identity of all shards, as hexadecimal SHA-256."""
        raise NotImplementedError

    def callbacks(self) -> list[Callback]:
        """What exact resume needs in the Trainer: `Trainer(callbacks=datamodule.callbacks())`."""
        return [ExactResume()]

    def state_dict(self) -> dict[str, Any]:
        """The train loader's state: position and identity."""
        return self._train.state_dict() if self._train is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the train loader, which may be made later, or has been already."""
        self._state = state_dict
        if self._train is not None:
            self._train.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Stop workers that were kept between epochs."""
        if self._train is not None:
            self._train.close()
