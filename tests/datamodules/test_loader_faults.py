"""Bad samples: masked and counted, or all ranks stop together; evaluation sees each sample once."""

from __future__ import annotations

from pathlib import Path

import pytest
from ddp_runs import SAMPLES, SHARDS, Stage, logged, run, write_numbers

pytestmark = pytest.mark.distributed


def damage(root: Path, *samples: int) -> None:
    """Overwrite the tar header of samples, after they were indexed."""
    first = 0
    for shard, count in enumerate(SHARDS):
        path = root / f"numbers-{shard:03d}.tar"
        content = bytearray(path.read_bytes())
        for sample in samples:
            if first <= sample < first + count:
                start = 1024 * (sample - first)
                content[start : start + 512] = b"x" * 512
        path.write_bytes(content)
        first += count


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "data" / "train")
    damage(tmp_path / "data" / "train", 5, 17, 31, 49)
    return tmp_path / "data"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_skipped_samples_move_no_other(world: int, damaged: Path, tmp_path: Path) -> None:
    skip = {"on_error": "skip", "max_bad": 4, "max_bad_share": 0.1}
    results = run(Stage(world, data=skip, trainer={"max_epochs": 1}), damaged, tmp_path / "out")
    assert all(isinstance(r, dict) for r in results), results
    lines = logged(tmp_path / "out", world)
    assert len({len(rank) for rank in lines}) == 1
    ids = sorted(i for rank in lines for line in rank for i in line["ids"])
    assert ids == sorted(set(range(SAMPLES)) - {5, 17, 31, 49})


@pytest.mark.parametrize(
    "policy", [{}, {"on_error": "skip", "max_bad": 1, "max_bad_share": 1.0}], ids=["raise", "budget"]
)
def test_all_ranks_stop_at_the_same_batch(policy: dict, damaged: Path, tmp_path: Path) -> None:
    results = run(Stage(2, data=policy), damaged, tmp_path / "out", timeout=60)
    assert [kind for kind, _ in results] == ["DataError", "DataError"]
    assert any("numbers-" in text for _, text in results)
    steps = [
        len(f.read_text().splitlines()) if f.exists() else 0
        for f in (tmp_path / "out" / f"rank{r}.jsonl" for r in range(2))
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_evaluation_sees_each_sample_once(task: str, world: int, tmp_path: Path) -> None:
    for split in ("val", "test"):
        write_numbers(tmp_path / "data" / split)
    stage = Stage(world, task=task, trainer={"limit_val_batches": 1.0})
    results = run(stage, tmp_path / "data", tmp_path / "out")
    assert all(isinstance(r, dict) for r in results), results
    lines = logged(tmp_path / "out", world, {"validate": "val"}.get(task, task))
    assert {len(rank) for rank in lines} == {-(-SAMPLES // (4 * world))}
    flat = [
        (p, i)
        for rank in lines
        for x in rank
        for p, i in zip([p for p in x["position"] if p >= 0], x["ids"], strict=True)
    ]
    assert sorted(flat) == [
        (i, i) for i in range(SAMPLES)
    ]  # unshuffled: the position is the place in the shards


def test_fewer_samples_than_places(tmp_path: Path) -> None:
    """Four samples on three ranks: one batch each, two of them with padding only in places."""
    write_numbers(tmp_path / "data" / "val", (4,))
    run(Stage(3, task="validate", trainer={"limit_val_batches": 1.0}), tmp_path / "data", tmp_path / "out")
    lines = logged(tmp_path / "out", 3, "val")
    assert [len(rank) for rank in lines] == [1, 1, 1]
    assert sorted(i for rank in lines for line in rank for i in line["ids"]) == [0, 1, 2, 3]
    assert sum(rank[0]["weight"] for rank in lines) == pytest.approx(3)
