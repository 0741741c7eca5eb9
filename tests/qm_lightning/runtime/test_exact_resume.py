"""N steps straight = k steps, stop, N - k steps: bit for bit, with real processes and real signals."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Attempt, Outcome, run, traced, write_shards

Straight = Callable[[Attempt], tuple[list[Outcome], Path]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Trains without a stop, once for each setting."""
    done: dict[str, tuple[list[Outcome], Path]] = {}

    def train(attempt: Attempt) -> tuple[list[Outcome], Path]:
        if repr(attempt) not in done:
            folder = tmp_path_factory.mktemp("straight")
            outcomes = run(attempt, shards, folder / "run", folder / "trace")
            assert [o.code for o in outcomes] == [0] * attempt.world, outcomes[0].text
            done[repr(attempt)] = outcomes, folder / "trace"
        return done[repr(attempt)]

    return train


def steps_of(trace: Path, rank: int, kind: str) -> list[dict[str, Any]]:
    """What a rank computed; a step that was repeated after a crash counts once, as it was the last time."""
    lines: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for line in traced(trace, rank, kind):
        lines[line["step"], tuple(line.get("ids", ()))] = line
    return list(lines.values())


def assert_exact(
    attempt: Attempt, expected: tuple[list[Outcome], Path], found: list[Outcome], trace: Path
) -> None:
    """Weights, optimizer moments, learning rate, losses, sample ids, noise, controller, validation: all equal."""
    for rank, (want, have) in enumerate(zip(expected[0], found, strict=True)):
        assert have.code == 0, have.text
        assert want.result is not None
        assert have.result is not None
        for key in ("state", "moments", "rate", "step"):
            assert have.result[key] == want.result[key], (rank, key)
        for kind in ("train", "val"):
            assert steps_of(trace, rank, kind) == steps_of(expected[1], rank, kind), (rank, kind)


def stop_and_resume(attempt: Attempt, stop: dict[str, Any], shards: Path, folder: Path) -> list[Outcome]:
    """The first attempt ends as `stop` says; a second one goes on from `last`."""
    first = run(replace(attempt, **stop), shards, folder / "run", folder / "trace")
    killed = stop.get("signal") == signal.SIGKILL
    assert all(o.code != 0 for o in first) if killed else [o.code for o in first] == [75] * attempt.world, (
        first
    )
    again = replace(attempt, ckpt_path="last")
    return run(again, shards, folder / "run", folder / "trace")


CORE = [
    pytest.param({}, {"signal_at": (5, 0)}, id="sigterm"),
    pytest.param({}, {"signal_at": (5, 0), "signal": signal.SIGUSR1}, id="sigusr1"),
    pytest.param({"checkpoint_every": 2}, {"signal_at": (7, 0), "signal": signal.SIGKILL}, id="sigkill"),
    pytest.param({}, {"signal_at": (9, 0)}, id="end of an epoch"),
    pytest.param({"accumulate": 3}, {"signal_at": (4, 0)}, id="accumulation"),
    pytest.param({"trainer": {"val_check_interval": 3}}, {"signal_at": (5, 0)}, id="at a validation"),
    pytest.param(
        {"trainer": {"val_check_interval": 3}}, {"signal_in_validation": (6, 2)}, id="inside a validation"
    ),
    pytest.param({"world": 2}, {"signal_at": (5, 1)}, id="2 ranks, sigterm on one"),
    pytest.param(
        {"world": 2, "checkpoint_every": 2},
        {"signal_at": (7, 1), "signal": signal.SIGKILL},
        id="2 ranks, one killed",
    ),
]


@pytest.mark.parametrize(("settings", "stop"), CORE)
def test_a_stopped_training_ends_as_an_unbroken_one(
    settings: dict[str, Any], stop: dict[str, Any], shards: Path, straight: Straight, tmp_path: Path
) -> None:
    attempt = Attempt(**settings)
    found = stop_and_resume(attempt, stop, shards, tmp_path)
    assert_exact(attempt, straight(attempt), found, tmp_path / "trace")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize(
    "batch", [3, 9, 10, 14]
)  # mid-epoch, before an epoch's end (1 rank: 10 batches), after
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_the_matrix(
    world: int, workers: int, accumulate: int, batch: int, number: int,
    shards: Path, straight: Straight, tmp_path: Path,
) -> None:  # fmt: skip
    attempt = Attempt(
        world=world, workers=workers, accumulate=accumulate, max_steps=24 // accumulate, checkpoint_every=1,
        trainer={"val_check_interval": 4 if world == 1 else 2},
    )  # fmt: skip
    stop = {"signal_at": (batch, world - 1), "signal": number}
    found = stop_and_resume(attempt, stop, shards, tmp_path)
    assert_exact(attempt, straight(attempt), found, tmp_path / "trace")


@pytest.mark.slow
def test_three_stops_are_as_good_as_one(shards: Path, straight: Straight, tmp_path: Path) -> None:
    attempt = Attempt(trainer={"val_check_interval": 4})
    for batch, ckpt_path in ((2, None), (1, "last"), (4, "last")):
        stopped = run(
            replace(attempt, signal_at=(batch, 0), ckpt_path=ckpt_path),
            shards,
            tmp_path / "run",
            tmp_path / "trace",
        )
        assert stopped[0].code == 75, stopped[0].text
    found = run(replace(attempt, ckpt_path="last"), shards, tmp_path / "run", tmp_path / "trace")
    assert_exact(attempt, straight(attempt), found, tmp_path / "trace")


def test_noise_differs_between_ranks(shards: Path, tmp_path: Path) -> None:
    outcomes = run(Attempt(world=2, max_steps=3), shards, tmp_path / "run", tmp_path / "trace")
    assert [o.code for o in outcomes] == [0, 0]
    noise = [line["noise"] for rank in (0, 1) for line in traced(tmp_path / "trace", rank)]
    assert len(noise) == 6
    assert len(set(noise)) == 6


def test_two_processes_equal_one_with_the_double_batch(shards: Path, tmp_path: Path) -> None:
    """Without noise, which is drawn by rank: weights after three epochs, to 1e-6."""
    quiet = Attempt(max_steps=15, dropout=0.0, noise=0.0)
    one = run(replace(quiet, batch=8), shards, tmp_path / "one", tmp_path / "trace1")[0].result
    two = [o.result for o in run(replace(quiet, world=2), shards, tmp_path / "two", tmp_path / "trace2")]
    assert one is not None
    for result in two:
        assert result is not None
        for name in ("merger.weight", "merger.bias", "prior.weight", "prior.bias"):
            difference = torch.tensor(one["state"][name]) - torch.tensor(result["state"][name])
            assert difference.abs().max() < 1e-6, name
    seen = [sorted(line["ids"]) for line in traced(tmp_path / "trace1")]
    halves = zip(traced(tmp_path / "trace2", 0), traced(tmp_path / "trace2", 1), strict=True)
    assert seen == [sorted(a["ids"] + b["ids"]) for a, b in halves]
