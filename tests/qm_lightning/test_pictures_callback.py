"""The callback that draws merge pictures during a run, in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from qm_lightning.callbacks.pictures import MergePictures
from qm_lightning.tokens import MergedTokens, Tokens


class Pairs(LightningModule):
    """Merges neighbouring tokens in pairs; trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.merges = 0

    def merge(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens]:
        assert not torch.is_grad_enabled()
        self.merges += 1
        size = batch["valid"].shape[0]
        tokens = Tokens(
            torch.zeros(size, 4, 2),
            torch.ones(size, 4, dtype=torch.bool),
            torch.arange(4).expand(size, 4)[..., None],
        )
        merged = MergedTokens(
            values=torch.zeros(size, 2, 2),
            mask=torch.ones(size, 2, dtype=torch.bool),
            size=torch.full((size, 2), 2.0),
            positions=torch.zeros(size, 2, 1, dtype=torch.long),
            ready=torch.zeros(size, 2, dtype=torch.long),
            assignment=torch.tensor([0, 0, 1, 1]).expand(size, 4),
            weights=torch.ones(size, 4),
        )
        return tokens, merged

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.number**2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(count: int) -> DataLoader[Any]:
    valid = torch.tensor([True, False, True, True])
    made = [{"valid": valid, "keys": [f"dir/key {b}.{i}" for i in range(4)]} for b in range(count)]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


class Letters(LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches(10)

    def val_dataloader(self) -> Any:
        return batches(2)

    def test_dataloader(self) -> Any:
        return batches(2)

    def describe_input(self, batch: dict[str, Any], index: int) -> list[str]:
        return list("text")


class Undescribed(Letters):
    describe_input = property()  # hasattr says no  # type: ignore[assignment]


class Noted(WandbLogger):
    """W&B's logger without W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, list[str], int | None, list[str]]] = []
        self._logged_model_time: dict[str, float] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((key, images, step, kwargs["caption"]))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def log_graph(self, model: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None: ...

    def finalize(self, status: str) -> None: ...

    @property
    def experiment(self) -> Any:
        return None

    @property
    def save_dir(self) -> str:
        return ""

    @property
    def name(self) -> str:
        return "noted"

    @property
    def version(self) -> str:
        return "0"


def trainer(root: Path, callback: MergePictures, logger: Any = False, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[callback],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_first_valid_samples_are_drawn_under_stable_names(tmp_path: Path) -> None:
    callback = MergePictures(tmp_path / "examples", samples=2)
    trainer(tmp_path, callback).test(Pairs(), Letters(), verbose=False)
    assert sorted(p.name for p in (tmp_path / "examples").iterdir()) == [
        "test-00-dir_key_0_0.png",
        "test-02-dir_key_0_2.png",
    ]


@pytest.mark.parametrize(
    ("every", "rounds", "steps"), [(0, 99, [2, 4, 6, 8, 10]), (4, 99, [2, 6, 10]), (0, 2, [2, 4])]
)
def test_rounds_keep_their_distance_and_their_number(
    tmp_path: Path, every: int, rounds: int, steps: list[int]
) -> None:
    logger = Noted()
    callback = MergePictures(tmp_path, samples=1, every_n_steps=every, rounds=rounds)
    module = Pairs()
    trainer(tmp_path, callback, logger, max_steps=10, val_check_interval=2, log_every_n_steps=1).fit(
        module, Letters()
    )
    assert [step for _, _, step, _ in logger.logged] == steps
    assert module.merges == len(steps)
    key, images, _, captions = logger.logged[0]
    assert key == "val/merge"
    assert images == [str(tmp_path / "val-00-dir_key_0_0.png")]
    assert captions == ["dir/key 0.0: 2 of 4 tokens"]
    assert Path(images[0]).read_bytes()[:4] == b"\x89PNG"


def test_a_resumed_run_does_not_begin_its_rounds_anew(tmp_path: Path) -> None:
    first = MergePictures(tmp_path, rounds=3)
    first.drawn, first.last_step = 3, 400
    second = MergePictures(tmp_path, rounds=3)
    second.load_state_dict(first.state_dict())
    logger = Noted()
    trainer(tmp_path, second, logger, max_steps=2, val_check_interval=2).fit(Pairs(), Letters())
    assert logger.logged == []


def test_a_datamodule_that_cannot_describe_its_inputs_is_left_alone(tmp_path: Path) -> None:
    module = Pairs()
    trainer(tmp_path, MergePictures(tmp_path / "examples")).test(module, Undescribed(), verbose=False)
    assert module.merges == 0
    assert not (tmp_path / "examples").exists()


def test_arrays_may_be_numpy_or_tensors(tmp_path: Path) -> None:
    class Grid(Pairs):
        def merge(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens]:
            tokens, merged = super().merge(batch)
            axes = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
            positions = torch.stack(axes, -1).reshape(1, 4, 2).expand(tokens.values.shape[0], 4, 2)
            return Tokens(tokens.values, tokens.mask, positions), merged

    class Pictures(Letters):
        def describe_input(self, batch: dict[str, Any], index: int) -> Any:
            return torch.rand(8, 8) if index else np.random.default_rng(0).random((8, 8))

    trainer(tmp_path, MergePictures(tmp_path / "examples")).test(Grid(), Pictures(), verbose=False)
    assert len(list((tmp_path / "examples").iterdir())) == 3
