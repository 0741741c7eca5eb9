"""Mixtures: exact weights, one part per batch, and a resume that loses and repeats nothing."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from ddp_runs import IdModule, write_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.errors import DataError
from datamodules.mixture import MixtureDataModule
from datamodules.shards.mixing import MixtureTurns

SIZES = {"a": 10, "b": 7, "c": 13}
WEIGHTS = {"a": 2, "b": 1, "c": 1}


class Numbers(IdModule):
    vocab_size, eos_id = 11, 10


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 3, 7]), min_size=1, max_size=5), st.integers(0, 9)
)
def test_weights_hold_exactly_in_every_cycle(weights: list[float], seed: int) -> None:
    turns = MixtureTurns(weights, seed)
    for cycle in (0, 1, 5):
        drawn = Counter(turns(cycle * len(turns) + i) for i in range(len(turns)))
        shares = [drawn[s] / len(turns) for s in range(len(weights))]
        assert shares == pytest.approx([w / sum(weights) for w in weights], abs=1e-12)


def test_cycles_are_short_and_shuffled_anew() -> None:
    assert len(MixtureTurns([0.5, 0.3, 0.2])) == 10
    assert len(MixtureTurns([4, 2, 2])) == 4
    turns = MixtureTurns([10, 10], 3)
    cycles = [[turns(c * len(turns) + i) for i in range(2)] for c in range(40)]
    assert {tuple(c) for c in cycles} == {(0, 1), (1, 0)}
    assert [turns(i) for i in range(80)] == [MixtureTurns([1, 1], 3)(i) for i in range(80)]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="mixture weights"):
        MixtureTurns(weights)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for name, size in SIZES.items():
        write_numbers(root / name / "train", (size - 3, 3))
        write_numbers(root / name / "val", (3,))
    return root


def mixture(root: Path, batch: int = 2, workers: int = 0, **options: Any) -> MixtureDataModule:
    parts = {name: Numbers(name, batch, num_workers=workers) for name in SIZES}
    return MixtureDataModule(parts, WEIGHTS, root=str(root), **options)  # type: ignore[arg-type]


class InjectedError(RuntimeError):
    pass


class Recorder(pl.LightningModule):
    """Writes down what it trains on."""

    def __init__(self, fatal: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fatal, self.seen, self.evaluated = fatal, [], []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fatal:
            raise InjectedError
        assert batch["valid"].all()
        self.seen.append((batch["modality"], batch["id"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        ids = batch["id"][batch["valid"]].tolist()
        self.evaluated.append((dataloader_idx, batch["modality"], ids))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    data: MixtureDataModule,
    folder: Path,
    resume: Path | None = None,
    fatal: int | None = None,
    **options: Any,
) -> Recorder:
    """Train; a checkpoint is made after every step."""
    model = Recorder(fatal)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"limit_val_batches": 0, "max_epochs": 2, **options}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[saving, *data.callbacks()], **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(model, data, ckpt_path=resume, weights_only=True)
        except InjectedError:
            assert fatal is not None
        else:
            assert fatal is None
    return model


def stream(seen: list[tuple[str, list[int]]], part: str) -> list[int]:
    return [i for name, ids in seen if name == part for i in ids]


def check(seen: list[tuple[str, list[int]]]) -> None:
    """Parts in their turns, and pass after pass each sample of a part once."""
    turns = MixtureTurns(list(WEIGHTS.values()))
    assert [name for name, _ in seen] == [list(SIZES)[turns(i)] for i in range(len(seen))]
    for part, size in SIZES.items():
        ids = stream(seen, part)
        for start in range(0, len(ids) - size + 1, size):
            assert sorted(ids[start : start + size]) == list(range(size))
        assert len(set(ids[len(ids) // size * size :])) == len(ids) % size


def test_parts_take_turns_and_show_each_sample_once_a_pass(root: Path, tmp_path: Path) -> None:
    model = fit(mixture(root), tmp_path, limit_val_batches=1.0)
    # 10, 7 and 13 samples in batches of 2 are 5, 3 and 6 batches of streams without end; 14 batches, cycles of 4.
    assert len(model.seen) == 2 * 16
    check(model.seen)
    assert model.evaluated[:6] == [(n, p, ids) for n, p in enumerate(SIZES) for ids in ([0, 1], [2])]


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"accumulate_grad_batches": 3}], ids=str)
def test_killed_and_resumed(options: dict[str, Any], root: Path, tmp_path: Path) -> None:
    workers = options.pop("workers", 0)
    whole = fit(mixture(root, workers=workers), tmp_path / "whole", **options).seen
    first = fit(mixture(root, workers=workers), tmp_path / "first", fatal=11, **options)
    step = 11 // options.get("accumulate_grad_batches", 1)
    second = fit(
        mixture(root, workers=workers), tmp_path / "second", tmp_path / f"first/step={step}.ckpt", **options
    )
    done = step * options.get("accumulate_grad_batches", 1)
    assert first.seen[:done] + second.seen == whole


def test_resumed_in_the_second_epoch_with_other_batches(root: Path, tmp_path: Path) -> None:
    """Every part goes on at its own next sample, whatever the size of a batch."""
    first = fit(mixture(root), tmp_path / "first", fatal=21)
    second = fit(mixture(root, batch=3), tmp_path / "second", tmp_path / "first/step=21.ckpt")
    check(first.seen + second.seen)
    assert {len(ids) for _, ids in second.seen} == {3}


def test_a_checkpoint_of_other_parts_is_refused(root: Path, tmp_path: Path) -> None:
    fit(mixture(root), tmp_path, fatal=2)
    parts = {"a": Numbers("a", 2), "d": Numbers("b", 2)}
    with pytest.raises(DataError, match="of the parts a, b, c, now there are a, d"):
        fit(MixtureDataModule(parts, root=str(root)), tmp_path / "second", tmp_path / "step=2.ckpt")


def test_mistakes_are_named(root: Path) -> None:
    with pytest.raises(DataError, match="weights for a and parts a, b"):
        MixtureDataModule({"a": Numbers("a", 2), "b": Numbers("b", 2)}, {"a": 1})
    other = Numbers("b", 2)
    other.vocab_size = 257
    with pytest.raises(DataError, match="vocabularies of a 11, b 257"):
        MixtureDataModule({"a": Numbers("a", 2), "b": other})
    with pytest.raises(DataError, match="no parts"):
        MixtureDataModule({})
    assert len(mixture(root, epoch_batches=5).train_dataloader()) == 5
    assert mixture(root).fingerprint() != mixture(root.parent).fingerprint()
