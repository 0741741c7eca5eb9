"""Samples come back as stored, in any order, with few descriptors; damage stays with its sample."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ddp_runs import SHARDS, write_numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.errors import DataError
from datamodules.shards import reader as reader_module
from datamodules.shards.manifest import Manifest
from datamodules.shards.reader import MAX_OPEN, SampleReader, ShardFile
from datamodules.shards.source import Source

FIRST = np.concatenate([[0], np.cumsum(SHARDS)])


def open_reader(root: Path) -> SampleReader:
    shards = [ShardFile(s.name, s.samples, s.bytes) for s in Manifest.load(root).shards]
    return SampleReader(shards, partial(Path, root))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_numbers(tmp_path / "train")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 49), max_size=60))
def test_any_samples_in_any_order(root: Path, numbers: list[int]) -> None:
    shard = np.searchsorted(FIRST, np.array(numbers, np.int64), side="right") - 1
    sample = np.array(numbers, np.int64) - FIRST[shard]
    got = open_reader(root).read(shard, sample)
    assert got == [(f"k{n:03d}", {"txt": str(n).encode()}) for n in numbers]


def test_neighbours_are_read_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "pread", lambda fd, n, at, real=os.pread: calls.append(n) or real(fd, n, at))
    open_reader(root).read(np.ones(10, np.int64), np.arange(10)[::-1])
    assert len(calls) == 1


def test_short_reads_are_completed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda fd, n, at, real=os.pread: real(fd, min(n, 700), at))
    got = open_reader(root).read(np.ones(3, np.int64), np.arange(3))
    assert [key for key, _ in got] == ["k003", "k004", "k005"]


def test_lengths_are_those_of_the_index(root: Path) -> None:
    lengths = open_reader(root).lengths(np.array([4, 0, 4]), np.array([11, 0, 3]))
    assert lengths.tolist() == [1024, 1024, 1024]


def test_few_descriptors(tmp_path: Path) -> None:
    reader = open_reader(write_numbers(tmp_path / "many", (1,) * 150))
    before = descriptors()
    for _ in range(2):
        assert not any(isinstance(r, Exception) for r in reader.read(np.arange(150), np.zeros(150, np.int64)))
    assert descriptors() - before <= MAX_OPEN
    reader.close()
    assert descriptors() <= before


def test_io_errors_are_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [2]

    def flaky(fd: int, n: int, at: int, real=os.pread) -> bytes:  # noqa: ANN001
        if fails[0]:
            fails[0] -= 1
            raise OSError(5, "Input/output error")
        return real(fd, n, at)

    monkeypatch.setattr(reader_module, "RETRIES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "pread", flaky)
    assert open_reader(root).read(np.array([0]), np.array([1]))[0][0] == "k001"
    fails[0] = 99
    assert isinstance(open_reader(root).read(np.array([0]), np.array([1]))[0], OSError)
    assert fails[0] == 95


def test_damage_stays_with_its_shard(root: Path) -> None:
    names = sorted(p.name for p in root.glob("*.tar"))
    (root / names[0]).unlink()
    with (root / names[1]).open("ab") as f:
        f.write(b"\0" * 512)  # another size than the manifest's
    (root / (names[2] + ".idx")).unlink()
    content = bytearray((root / names[4]).read_bytes())
    content[1024:1536] = b"x" * 512
    (root / names[4]).write_bytes(content)
    got = open_reader(root).read(np.array([0, 1, 2, 3, 4, 4]), np.array([0, 0, 0, 0, 1, 2]))
    assert isinstance(got[0], FileNotFoundError)
    for i, message in ((1, "the manifest says"), (2, "missing"), (4, "checksum")):
        assert isinstance(got[i], DataError)
        assert message in str(got[i])
    assert got[3] == ("k020", {"txt": b"20"})
    assert got[5] == ("k023", {"txt": b"23"})


def test_index_of_another_shard(root: Path) -> None:
    names = sorted(p.name for p in root.glob("*.tar"))
    (root / (names[0] + ".idx")).write_bytes((root / (names[1] + ".idx")).read_bytes())
    (error,) = open_reader(root).read(np.array([0]), np.array([0]))
    assert "holds 10 samples, the manifest says 3" in str(error)


def test_source_asks_for_its_fields(root: Path) -> None:
    source = Source.open(str(root))
    assert source is not None
    source.require(("txt",))
    with pytest.raises(DataError, match="lack jpg, found txt"):
        source.require(("jpg", "txt"))
    assert Source.open(str(root / "nowhere")) is None


def test_indexes_in_memory_are_limited(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "INDEX_BYTES", 120)
    reader = open_reader(root)
    for _ in range(2):
        got = reader.read(np.arange(8), np.zeros(8, np.int64))
        assert [key for key, _ in got] == [f"k{n:03d}" for n in FIRST[:-1]]
        assert sum(o.nbytes for o in reader._offsets.values()) == reader._offset_bytes <= 120
