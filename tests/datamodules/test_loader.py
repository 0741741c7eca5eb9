"""The loader without a trainer: what a batch holds, state, workers, every geometry."""

from __future__ import annotations

import json
import logging
import multiprocessing as mp
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import SAMPLES, IdModule, write_numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.errors import DataError
from datamodules.shards.faults import FaultPolicy
from datamodules.shards.geometry import Geometry
from datamodules.shards.loader import StreamLoader
from datamodules.shards.order import OrderSettings
from datamodules.shards.source import Source
from datamodules.shards.stream import StreamSpec
from datamodules.shards.writer import write_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("loader")
    write_numbers(base / "train")
    return base


def loader(
    root: Path, batch: int = 4, rank: int = 0, world: int = 1, tail: Any = "pad", **order: Any
) -> StreamLoader:
    source, module = Source.open(str(root / "train")), IdModule(root, batch)
    assert source is not None
    geometry = Geometry(source.total, batch, rank, world, tail)
    settings = OrderSettings(**order)
    spec = StreamSpec(source.shards, source.locate, settings, geometry, module.decode, module.collate)
    return StreamLoader(spec, source.fingerprint)


def ids(batch: dict[str, Any]) -> list[int]:
    return batch["id"][batch["valid"]].tolist()


def test_a_batch_has_the_keys_of_the_contract(root: Path) -> None:
    first, *_, last = loader(root)
    assert first["keys"] == [f"k{i:03d}" for i in first["id"].tolist()]
    assert first["position"].tolist() == [0, 1, 2, 3]
    assert first["valid"].tolist() == [True] * 4
    assert first["seeds"].dtype == first["position"].dtype == torch.int64
    assert (first["progress"], last["progress"]) == ((0, 4), (0, 50))
    assert type(first["progress"]) is tuple
    assert first["weight"] == last["weight"] == 1.0
    assert last["valid"].tolist() == [True, True, False, False]
    assert last["position"].tolist() == [48, 49, -1, -1]
    assert last["id"].shape == (4,)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_any_chain_of_lives_sees_each_sample_once(root: Path, seed: int) -> None:
    draw, state, seen, seeds = random.Random(seed), None, [], {}
    while len(seen) < SAMPLES:
        world, batch = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 4, 7])
        unit = draw.choice([1, 2, 3])
        order = {
            "window": draw.choice([0, 5, 99]),
            "slice_len": draw.choice([1, 4]),
            "lanes": draw.choice([1, 3]),
        }
        ranks = [loader(root, batch, r, world, unit=unit, bucket=unit * 4, **order) for r in range(world)]
        for rank in ranks:
            rank.set_epoch(2)
            if state is not None:
                rank.load_state_dict(json.loads(state))
        steps = draw.randint(1, len(ranks[0]))
        for batches in list(zip(*ranks, strict=True))[:steps]:
            for rank, b in zip(ranks, batches, strict=True):
                rank.commit(b["progress"])
                seen += ids(b)
                valid = b["valid"]
                seeds |= dict(zip(b["position"][valid].tolist(), b["seeds"][valid].tolist(), strict=True))
        states = {json.dumps(rank.state_dict() | {"rank": 0}) for rank in ranks}
        assert len(states) == 1
        (state,) = states
    assert sorted(seen) == list(range(SAMPLES))
    assert len(set(seeds.values())) == SAMPLES


def test_length_is_that_of_the_whole_epoch(root: Path) -> None:
    resumed = loader(root)
    resumed.load_state_dict(loader(root).state_dict() | {"consumed": 40})
    assert len(resumed) == 13
    assert len(list(resumed)) == 3


def test_iterating_is_lazy(root: Path) -> None:
    stream = loader(root)
    batches = iter(stream)
    stream.set_epoch(3)
    assert next(batches)["progress"] == (3, 4)


def test_epochs_differ_and_evaluation_repeats(root: Path) -> None:
    stream = loader(root)
    first, second = ([i for b in stream for i in ids(b)] for _ in range(2))  # a plain loop goes on by itself
    assert sorted(first) == sorted(second)
    assert first != second
    module = IdModule(root, 4)
    write_numbers(root / "val")
    evaluation = module.val_dataloader()
    passes = []
    for epoch in (0, 5):
        evaluation.set_epoch(epoch)
        passes.append([(ids(b), b["seeds"].tolist()) for b in evaluation])
    assert passes[0] == passes[1]


def test_order_settings_of_the_checkpoint_hold_until_the_epoch_ends(root: Path) -> None:
    old, new = loader(root, seed=1), loader(root, seed=2)
    kept = [ids(b) for b in old]
    new.load_state_dict(loader(root, seed=1).state_dict() | {"consumed": 8})
    assert [ids(b) for b in new] == kept[2:]
    assert new.state_dict()["order"]["seed"] == 1
    new.set_epoch(1)
    fresh = loader(root, seed=2)
    fresh.set_epoch(1)
    assert [ids(b) for b in new] == [ids(b) for b in fresh]
    assert new.state_dict()["order"]["seed"] == 2


def test_buckets_spare_padding(tmp_path: Path) -> None:
    """Lengths come from the index of real shards; each sample still comes once, on any number of ranks."""
    sizes = [int(2 ** random.Random(i).uniform(6, 13)) for i in range(200)]
    samples = [
        {"__key__": f"k{i:03d}".encode(), "txt": str(i).encode().ljust(n)} for i, n in enumerate(sizes)
    ]
    write_shards(tmp_path, "train", samples, shard_size=30, progress=False)

    def padding(bucket: int) -> float:
        ranks = [loader(tmp_path, 5, rank, 2, unit=5, bucket=bucket, window=0) for rank in range(2)]
        batches = [ids(batch) for rank in ranks for batch in rank]
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        return sum(5 * max(sizes[i] for i in batch) for batch in batches) / sum(sizes) - 1

    assert padding(bucket=50) < 0.35 * padding(bucket=0)


def test_state_of_other_shards_or_versions(root: Path) -> None:
    state = loader(root).state_dict()
    with pytest.raises(DataError, match="50 samples in 8 shards"):
        loader(root).load_state_dict(state | {"fingerprint": "0"})
    with pytest.raises(DataError, match="version 9"):
        loader(root).load_state_dict(state | {"version": 9})


def test_state_is_small_and_plain(root: Path) -> None:
    state = loader(root).state_dict()
    assert len(json.dumps(state)) < 500
    assert json.loads(json.dumps(state)) == state


def test_unreported_position_is_not_guessed(root: Path) -> None:
    stream = loader(root)
    next(iter(stream))
    resumed = loader(root)
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="exact-resume callback"):
        next(iter(resumed))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_change_nothing(method: Any, persistent: bool, root: Path) -> None:
    mp.get_context("forkserver").set_forkserver_preload(["datamodules.base"])
    plain = IdModule(root, 4).train_dataloader()
    module = IdModule(root, 4, num_workers=2, start_method=method, persistent_workers=persistent)
    worked = module.train_dataloader()
    for epoch in range(2):
        plain.set_epoch(epoch)
        worked.set_epoch(epoch)
        for a, b in zip(plain, worked, strict=True):
            assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in a.items()} == {
                k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in b.items()
            }
    worked.close()


def test_workers_leave_the_global_random_state_alone(root: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    next(iter(IdModule(root, 4, num_workers=1, start_method="fork").train_dataloader()))
    assert torch.equal(torch.rand(3), wanted)


def test_datamodule_can_go_to_a_worker_without_its_trainer(root: Path) -> None:
    module = IdModule(root, 4)
    module.trainer = lambda: None  # cannot be pickled
    module._train = module._state = None
    assert pickle.loads(pickle.dumps(module)).trainer is None  # noqa: S301


def test_bad_sample_names_itself(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = loader(root)

    def refuse(fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        if key == "k017":
            raise DataError("too blue")
        return {"id": int(fields["txt"]), "augmented": 0.0}

    spec = stream._spec
    object.__setattr__(spec, "decode", refuse)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"on_error=\"skip\""):
        list(stream)
    for part in ("sample 4 of numbers-002.tar", "'k017'", "epoch 0", "position", "too blue"):
        assert part in caplog.text


@pytest.mark.parametrize(
    ("count", "share", "allowed"), [(100, 0.01, 10), (3, 0.01, 3), (100, 0.0, 0)], ids=str
)
def test_budget_is_the_smaller_limit(count: int, share: float, allowed: int) -> None:
    assert FaultPolicy("skip", count, share).allowed(1000) == allowed
    assert FaultPolicy("raise", count, share).allowed(1000) == 0


def test_missing_split(tmp_path: Path) -> None:
    module = IdModule(tmp_path, 4)
    assert module.val_dataloader() == []
    with pytest.raises(DataError, match="python -m datamodules index"):
        module.train_dataloader()
    with pytest.raises(DataError, match=r"there is no folder .*/typo; expected one with train/"):
        IdModule(tmp_path / "typo", 4).train_dataloader()


def test_a_splits_folder_as_root(root: Path) -> None:
    with pytest.raises(DataError, match=r"train holds shards itself; expected .*give the one above it"):
        IdModule(root / "train", 4).train_dataloader()


@pytest.mark.parametrize("options", [{"num_workers": -1}, {"num_workers": 1, "prefetch": 0}])
def test_numbers_that_torch_would_refuse(options: dict[str, int], root: Path) -> None:
    with pytest.raises(DataError, match=r"num_workers is .*expected at least 0 and 1"):
        IdModule(root, 4, **options).train_dataloader()


@pytest.mark.slow
def test_spawned_workers(root: Path) -> None:
    plain = [ids(b) for b in IdModule(root, 4).train_dataloader()]
    worked = IdModule(root, 4, num_workers=2, start_method="spawn").train_dataloader()
    assert [ids(b) for b in worked] == plain
