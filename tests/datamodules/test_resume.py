"""Stop anywhere, go on with anything: through real `Trainer.fit` processes every sample is trained exactly
once.

The model is the ledger: an optimizer step adds one to the weight of each (epoch, position) it was given, so what a
checkpoint rolled back is not counted and what was trained twice shows.
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddp_runs import SAMPLES, IdModule, Stage, gumbel_of, ledger_of, logged, newest, run, write_numbers

from datamodules.shards.geometry import Geometry, Progress
from datamodules.shards.hashing import sample_seeds
from datamodules.shards.order import EpochOrder, OrderSettings

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("numbers")
    write_numbers(base / "train")
    write_numbers(base / "val")
    return base


def interrupted(
    first: Stage, second: Stage, root: Path, out: Path, timeout: float = 90
) -> tuple[np.ndarray, dict[str, Any]]:
    """Run until the first stage dies, resume with the second; the ledger, and the checkpoint used."""
    ended = run(first, root, out / "first", timeout=timeout)
    assert not any(isinstance(r, dict) for r in ended), "the first stage was to die"
    path = newest(out / "first")
    results = run(second, root, out / "second", path, timeout)
    return ledger_of(results), torch.load(path, weights_only=True)


def expected(stage: Stage, start: Progress, batches: int) -> list[list[dict[str, Any]]]:
    """What each rank must get from a position on, by the pure functions alone."""
    seed, counts = stage.data.get("seed", 0), (3, 10, 7, 1, 12, 5, 2, 10)
    first = np.concatenate([[0], np.cumsum(counts)])
    ranks = []
    for rank in range(stage.world):
        geometry = Geometry(SAMPLES, stage.batch, rank, stage.world, stage.data.get("tail", "pad"))
        got = []
        for number in range(batches):
            absolute = geometry.share(start, number).positions
            epoch, position = np.divmod(absolute, SAMPLES)
            ids = []
            for e, p in zip(epoch.tolist(), position.tolist(), strict=True):
                shard, sample = EpochOrder(counts, OrderSettings(seed=seed), e)(np.array([p]))
                ids.append(int(first[shard[0]] + sample[0]))
            seeds = sample_seeds(seed, epoch, position)
            noise = [np.random.RandomState(s % 2**32).rand() for s in seeds.tolist()]
            gumbel = gumbel_of(torch.from_numpy(seeds))
            got.append({"ids": ids, "seeds": seeds.tolist(), "augmented": noise, "gumbel": gumbel})
        ranks.append(got)
    return ranks


def same_batches(out: Path, stage: Stage, start: Progress, epochs: int) -> None:
    """The logged batches of a resumed stage are those of the pure functions, in order."""
    for rank, lines in enumerate(logged(out, stage.world)):
        geometry = Geometry(SAMPLES, stage.batch, rank, stage.world, stage.data.get("tail", "pad"))
        if geometry.tail == "carry":
            wanted = expected(stage, start, len(lines))[rank]
        else:
            here = expected(stage, start, geometry.remaining(start.consumed))[rank]
            later = [
                expected(stage, Progress(e, 0), geometry.batches)[rank]
                for e in range(start.epoch + 1, epochs)
            ]
            wanted = sum(later, here)
        assert [{k: line[k] for k in ("ids", "seeds", "augmented", "gumbel")} for line in lines] == wanted
        assert all(line["size"] == stage.batch for line in lines)


def whole_epochs(seen: np.ndarray, epochs: int = 2) -> None:
    """Each sample of each epoch once, nothing else."""
    assert (seen[:epochs] == 1).all(), (
        f"missing {np.argwhere(seen[:epochs] == 0)}, twice {np.argwhere(seen > 1)}"
    )
    assert (seen[epochs:] == 0).all()


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state == checkpoint[IdModule.__qualname__]
    return state


def start_of(checkpoint: dict[str, Any]) -> Progress:
    state = state_of(checkpoint)
    start = Progress(state["epoch"], state["consumed"])
    return Progress(start.epoch + 1, 0) if start.consumed == SAMPLES and state["tail"] != "carry" else start


def slow(*values: Any) -> Any:
    """A case that only the whole suite runs: one like it runs each time."""
    return pytest.param(*values, marks=pytest.mark.slow)


# The same numbers again: worlds x workers x tails, killed at a random step ------------------------------


CORE = {(1, 0, "pad"), (2, 2, "pad"), (3, 0, "drop"), (2, 0, "carry")}
"""Cells of the matrix that run each time; the others are slow."""


@pytest.mark.parametrize(
    ("world", "workers", "tail"),
    [
        pytest.param(*cell, marks=[] if cell in CORE else pytest.mark.slow)
        for cell in itertools.product([1, 2, 3], [0, 2], ["pad", "drop", "carry"])
    ],
)
def test_killed(world: int, workers: int, tail: str, root: Path, tmp_path: Path) -> None:
    """SIGKILL anywhere; checkpoints every second step, so that steps are lost and done again."""
    steps = 2 * Geometry(SAMPLES, 4, 0, world, tail).batches
    fatal = random.Random(zlib.crc32(f"{world} {workers} {tail}".encode())).randrange(2, steps)
    stage = Stage(world, workers, data={"tail": tail, "seed": world}, checkpoint={"every_n_train_steps": 2})
    seen, checkpoint = interrupted(replace(stage, fatal=fatal), stage, root, tmp_path)
    done = (fatal // 2 * 2) * 4 * world
    if tail == "pad":
        whole_epochs(seen)
    elif tail == "drop":
        kept = SAMPLES // (4 * world) * 4 * world
        assert (seen[:2, :kept] == 1).all()
        assert seen.sum() == 2 * kept
    else:
        assert seen.sum() == steps * 4 * world
        assert (seen.reshape(-1)[: steps * 4 * world] == 1).all()
        assert state_of(checkpoint)["epoch"] * SAMPLES + state_of(checkpoint)["consumed"] == done
    same_batches(tmp_path / "second", stage, start_of(checkpoint), 2)
    before = expected(stage, Progress(0, 0), 3)
    for rank, lines in enumerate(logged(tmp_path / "first", world)):
        assert [line["ids"] for line in lines[:3]] == [b["ids"] for b in before[rank]][: len(lines)]


# Other numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Stage(2), Stage(1)),
        (Stage(1), Stage(2, batch=3)),
        (Stage(2), Stage(3)),
        (Stage(1, batch=6, accumulate=2), Stage(3, batch=2, accumulate=2)),
        (Stage(1, data={"tail": "carry"}), Stage(3, 2, data={"tail": "carry"})),
        (
            Stage(1, data={"lanes": 2, "window": 8, "slice_len": 4}),
            Stage(2, batch=3, data={"lanes": 3, "window": 5}),
        ),
        (Stage(2, data={"bucket_batches": 3}), Stage(1, batch=3, data={"bucket_batches": 2})),
        slow(Stage(1), Stage(2)),
        slow(Stage(3, 2), Stage(1, 0)),
        slow(Stage(1, 0), Stage(1, 2)),
        slow(Stage(2), Stage(2, batch=7)),
        slow(Stage(2), Stage(1, batch=8)),
        slow(Stage(2, data={"tail": "carry"}), Stage(1, data={"tail": "carry"})),
    ],
    ids=lambda s: f"{s.world}x{s.batch}w{s.workers}" + s.data.get("tail", ""),
)
def test_resized(first: Stage, second: Stage, root: Path, tmp_path: Path) -> None:
    fatal = random.Random(repr((first, second))).randrange(
        2, Geometry(SAMPLES, first.batch, 0, first.world).batches
    )
    seen, _ = interrupted(replace(first, fatal=fatal), second, root, tmp_path)
    if first.data.get("tail") == "carry":
        flat = seen.reshape(-1)
        assert (flat[: flat.sum()] == 1).all()
        assert flat.sum() >= 2 * SAMPLES - 3 * second.batch * second.world
    else:
        whole_epochs(seen)


@pytest.mark.parametrize("second", [Stage(1, batch=3), slow(Stage(3, 2))], ids=str)
def test_resized_with_the_rest_dropped(second: Stage, root: Path, tmp_path: Path) -> None:
    """From the checkpoint on, as many whole batches as are left; in the next epoch as many as fit."""
    first = Stage(2, fatal=3, data={"tail": "drop"})
    seen, checkpoint = interrupted(first, replace(second, data=first.data), root, tmp_path)
    done, step = state_of(checkpoint)["consumed"], second.batch * second.world
    kept = [done + (SAMPLES - done) // step * step, SAMPLES // step * step]
    assert [(seen[epoch, :end] == 1).all() for epoch, end in enumerate(kept)] == [True, True]
    assert seen.sum() == sum(kept)


# Moments ------------------------------------------------------------------------------------------------

NOW = {"every_n_train_steps": 10**6}  # no checkpoint but the one that the case is about


@pytest.mark.parametrize(
    "second", [Stage(2, accumulate=3), Stage(1, batch=3, accumulate=2), slow(Stage(1, accumulate=3))], ids=str
)
def test_exception_in_an_accumulation_window(second: Stage, root: Path, tmp_path: Path) -> None:
    """The checkpoint made on the exception goes back to the last applied step, not to the last batch."""
    first = Stage(2, accumulate=3, fatal=4, how="raise", checkpoint=NOW | {"save_on_exception": True})
    seen, checkpoint = interrupted(first, second, root, tmp_path)
    assert state_of(checkpoint)["consumed"] == 3 * 8
    whole_epochs(seen)


@pytest.mark.parametrize("fatal", [slow(1), 7, slow(9)])
def test_save_on_exception(fatal: int, root: Path, tmp_path: Path) -> None:
    """Early, in the first batch of the second epoch, and inside it."""
    first = Stage(2, fatal=fatal, how="raise", checkpoint=NOW | {"save_on_exception": True})
    seen, checkpoint = interrupted(first, Stage(2), root, tmp_path)
    assert checkpoint["global_step"] == fatal
    whole_epochs(seen)


@pytest.mark.parametrize("second", [slow(Stage(2)), Stage(1)], ids=str)
def test_checkpoint_at_validation_end(second: Stage, root: Path, tmp_path: Path) -> None:
    validating = {"limit_val_batches": 1.0, "val_check_interval": 3}
    saved = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    first = Stage(2, fatal=5, trainer=validating, checkpoint=saved)
    seen, checkpoint = interrupted(first, replace(second, trainer=validating), root, tmp_path)
    assert checkpoint["global_step"] == 3
    whole_epochs(seen)
    for lines in (logged(tmp_path / "second", second.world, "val"),):
        ids = sorted(i for rank in lines for line in rank for i in line["ids"])
        assert len(ids) % SAMPLES == 0
        assert ids == sorted(list(range(SAMPLES)) * (len(ids) // SAMPLES))


@pytest.mark.parametrize(
    ("fatal", "limit"),
    [(7, {}), (8, {"max_steps": 14}), *(slow(*c) for c in ((8, {}), (10, {}), (7, {"max_steps": 14})))],
)
def test_around_the_end_of_an_epoch(fatal: int, limit: dict[str, int], root: Path, tmp_path: Path) -> None:
    """Checkpoints of the last batch of epoch 0 and of batches of epoch 1, limited by epochs or steps."""
    first = Stage(2, fatal=fatal, trainer=limit)
    seen, _ = interrupted(first, Stage(2, trainer=limit), root, tmp_path)
    whole_epochs(seen)


@pytest.mark.parametrize(
    ("fatal", "second"),
    [
        (7, Stage(1, trainer={"max_steps": 20})),
        slow(9, Stage(1, trainer={"max_steps": 20})),
        slow(7, Stage(2, batch=2)),
        slow(9, Stage(2, batch=2)),
    ],
)
def test_resized_around_the_end_of_an_epoch(fatal: int, second: Stage, root: Path, tmp_path: Path) -> None:
    limit = {"max_steps": 99} if second.trainer else {}
    seen, _ = interrupted(Stage(2, fatal=fatal, trainer=limit), second, root, tmp_path)
    whole_epochs(seen)


@pytest.mark.parametrize("steps", [-1, slow(14)])
def test_checkpoint_after_the_epoch(steps: int, root: Path, tmp_path: Path) -> None:
    """Saved in on_train_epoch_end."""
    first = Stage(2, fatal=9, trainer={"max_steps": steps}, checkpoint={"save_on_train_epoch_end": True})
    seen, checkpoint = interrupted(first, replace(first, fatal=None), root, tmp_path)
    assert checkpoint["global_step"] == 7
    whole_epochs(seen)


@pytest.mark.parametrize("second", [slow(Stage(2, schedule=True)), Stage(1, schedule=True)], ids=str)
def test_estimated_stepping_batches(second: Stage, root: Path, tmp_path: Path) -> None:
    """Makes Lightning build the loader before it loads the loops, and drop the loader's own state."""
    seen, _ = interrupted(Stage(2, fatal=5, schedule=True), second, root, tmp_path)
    whole_epochs(seen)


def test_persistent_workers(root: Path, tmp_path: Path) -> None:
    stage = Stage(2, 2, data={"persistent_workers": True}, trainer={"max_epochs": 3})
    seen, checkpoint = interrupted(replace(stage, fatal=10), stage, root, tmp_path)
    whole_epochs(seen, 3)
    same_batches(tmp_path / "second", stage, start_of(checkpoint), 3)


@pytest.mark.slow
def test_three_lives(root: Path, tmp_path: Path) -> None:
    """Killed, resumed elsewhere, killed again, resumed."""
    run(Stage(2, fatal=4), root, tmp_path / "a")
    run(Stage(3, fatal=3), root, tmp_path / "b", newest(tmp_path / "a"))
    whole_epochs(ledger_of(run(Stage(1), root, tmp_path / "c", newest(tmp_path / "b"))))


@pytest.mark.parametrize("limit", [{}, slow({"max_epochs": -1, "max_steps": 21})], ids=str)
def test_a_third_life_after_the_end_of_an_epoch(limit: dict[str, int], root: Path, tmp_path: Path) -> None:
    """The first ends with the last batch of epoch 0; what the second saves in epoch 1 is no finished epoch."""
    run(Stage(fatal=13, trainer=limit), root, tmp_path / "a")
    run(Stage(fatal=2, trainer=limit), root, tmp_path / "b", newest(tmp_path / "a"))
    results = run(Stage(accumulate=2, trainer=limit), root, tmp_path / "c", newest(tmp_path / "b"))
    whole_epochs(ledger_of(results))  # the last window has one batch, and is applied all the same
    assert results[0]["epoch"] == 2


def test_lives_after_a_failure(root: Path, tmp_path: Path) -> None:
    """The batch that failed is counted by none of them, so the last batch is known as such and its window applied."""
    run(Stage(fatal=3, how="raise", checkpoint=NOW | {"save_on_exception": True}), root, tmp_path / "a")
    run(Stage(fatal=2), root, tmp_path / "b", newest(tmp_path / "a"))
    results = run(Stage(accumulate=5), root, tmp_path / "c", newest(tmp_path / "b"))
    whole_epochs(ledger_of(results))
    assert results[0]["batches"] == len(logged(tmp_path / "c", 1)[0]) - 8 == 13


@pytest.mark.parametrize(
    "option", [slow({"reload_dataloaders_every_n_epochs": 1}), {"limit_train_batches": 5}], ids=str
)
def test_trainer_options(option: dict[str, Any], root: Path, tmp_path: Path) -> None:
    stage = Stage(2, trainer=option)
    seen, _ = interrupted(replace(stage, fatal=6), stage, root, tmp_path)
    kept = 40 if "limit_train_batches" in option else SAMPLES
    assert (seen[:2, :kept] == 1).all()
    assert seen.sum() == 2 * kept


@pytest.mark.parametrize("second", [slow(Stage(2, schedule=True)), Stage(1, batch=3, schedule=True)], ids=str)
def test_saved_between_step_and_batch_end(second: Stage, root: Path, tmp_path: Path) -> None:
    """As a signal handler would: the optimizer has stepped, Lightning has not yet counted the batch."""
    first = Stage(2, schedule=True, fatal=4, how="save", checkpoint=NOW)
    seen, checkpoint = interrupted(first, second, root, tmp_path)
    assert state_of(checkpoint)["consumed"] == 4 * 8
    whole_epochs(seen)


def test_manual_optimisation(root: Path, tmp_path: Path) -> None:
    """A failure in an open window of the module's own accumulation."""
    first = Stage(2, manual=True, fatal=3, how="raise", checkpoint=NOW | {"save_on_exception": True})
    seen, checkpoint = interrupted(first, Stage(2, manual=True), root, tmp_path)
    assert state_of(checkpoint)["consumed"] == 2 * 8
    whole_epochs(seen)


def test_one_rank_dies(root: Path, tmp_path: Path) -> None:
    """The other one ends with an error, not with a wait."""
    ended = run(Stage(2, fatal=3, how="kill one"), root, tmp_path / "a", timeout=60)
    assert ended[0] is None
    assert isinstance(ended[1], tuple)
    whole_epochs(ledger_of(run(Stage(2), root, tmp_path / "b", newest(tmp_path / "a"))))


def test_without_the_callback(root: Path, tmp_path: Path) -> None:
    """Such checkpoints resume at the end of an epoch, and are refused inside one."""
    stage = Stage(2, callbacks=False)
    run(replace(stage, fatal=5), root, tmp_path / "inside")
    (kind, text), _ = run(Stage(2), root, tmp_path / "refused", newest(tmp_path / "inside"))
    assert kind == "DataError"
    assert "exact-resume callback" in text
    at_end = replace(stage, fatal=9, checkpoint={"save_on_train_epoch_end": True})
    seen, _ = interrupted(at_end, Stage(2), root, tmp_path / "end")
    whole_epochs(seen)


def test_shards_changed_since_the_checkpoint(root: Path, tmp_path: Path) -> None:
    run(Stage(fatal=3), root, tmp_path / "first")
    write_numbers(tmp_path / "other" / "train", (3, 10, 7, 1, 12, 5, 10, 2))
    for schedule in (False, True):  # the loader is made before or after the checkpoint's loops are loaded
        out = tmp_path / f"second{schedule}"
        ((kind, text),) = run(Stage(schedule=schedule), tmp_path / "other", out, newest(tmp_path / "first"))
        assert kind == "DataError"
        assert "shards changed since this checkpoint" in text
        assert not (out / "rank0.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_start_methods(method: str, root: Path, tmp_path: Path) -> None:
    """Every worker loads torch anew, which on a busy machine takes minutes."""
    stage = Stage(2, 2, data={"start_method": method, "persistent_workers": True})
    seen, checkpoint = interrupted(replace(stage, fatal=9), stage, root, tmp_path, timeout=400)
    whole_epochs(seen)
    same_batches(tmp_path / "second", stage, start_of(checkpoint), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_lives(seed: int, root: Path, tmp_path: Path) -> None:
    """Any chain of ranks, workers, batch sizes, accumulation and ends."""
    draw, life, checkpoint = random.Random(seed), 0, None
    while True:
        stage = Stage(
            draw.choice([1, 2, 3]),
            draw.choice([0, 2]),
            draw.choice([2, 3, 4, 7]),
            draw.choice([1, 1, 2, 3]),
            fatal=draw.randrange(3, 9) if life < 4 else None,
            how=draw.choice(["kill", "raise"]),
            checkpoint={"every_n_train_steps": draw.choice([1, 2]), "save_on_exception": True},
        )
        results = run(stage, root, tmp_path / str(life), checkpoint)
        if isinstance(results[0], dict):
            whole_epochs(ledger_of(results))
            return
        saved = list((tmp_path / str(life) / "checkpoints").glob("*.ckpt"))
        checkpoint = newest(tmp_path / str(life)) if saved else checkpoint
        life += 1
