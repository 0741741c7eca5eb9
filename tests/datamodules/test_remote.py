"""Shards from elsewhere: whole and right, fetched once, whatever the server does; room is made when it is short."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddp_runs import SAMPLES, SHARDS, IdModule, Stage, ledger_of, logged, run, write_numbers
from web_server import FileServer, serving

from datamodules.errors import DataError
from datamodules.shards import remote as remote_module
from datamodules.shards.cache import ShardCache
from datamodules.shards.index import build_index
from datamodules.shards.manifest import Manifest
from datamodules.shards.reader import SampleReader
from datamodules.shards.remote import Remote
from datamodules.shards.source import Source

RANGE = 2000  # bytes; shards of the test are 10 to 20 KB


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "data" / "train")
    return tmp_path / "data"


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote_module, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote_module, "RANGE_BYTES", RANGE)
    with serving(root) as running:
        yield running


def source(server: FileServer, cache: Path, limit: int | None = None) -> Source:
    found = Source.open(f"{server.url}/train", cache, limit)
    assert found is not None
    return found


def read_all(found: Source) -> list[Any]:
    shard = np.repeat(np.arange(len(SHARDS)), SHARDS)
    sample = np.concatenate([np.arange(count) for count in SHARDS])
    return SampleReader(found.shards, found.locate, 4).read(shard, sample)


WHOLE = [(f"k{i:03d}", {"txt": str(i).encode()}) for i in range(SAMPLES)]


def stored(cache: Path, pattern: str = "*.tar") -> list[Path]:
    return list(cache.glob(f"*/{pattern}"))


def batches(module: IdModule) -> list[Any]:
    return [
        (b["id"].tolist(), b["position"].tolist(), b["seeds"].tolist()) for b in module.train_dataloader()
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_a_folder(
    workers: int, server: FileServer, root: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_workers": workers, "start_method": "fork" if workers else None}
    module = IdModule(server.url, 4, cache_dir=tmp_path / "cache", **options)
    assert batches(module) == batches(IdModule(root, 4))
    shards = {at: n for at, n in server.asked.items() if at[0].endswith((".tar", ".idx"))}
    assert set(shards.values()) == {1}, "some bytes were fetched twice"
    assert len({path for path, _ in shards}) == 2 * len(SHARDS)
    requests = server.asked.total()
    assert batches(module) == batches(IdModule(root, 4))
    assert server.asked.total() == requests
    assert [p for p in stored(tmp_path / "cache", "*") if p.suffix == ".part"] == []


def test_several_ranges_are_in_flight(server: FileServer, tmp_path: Path) -> None:
    server.delay = 0.05
    found = source(server, tmp_path / "cache")
    path = found.locate("numbers-001.tar")
    size = path.stat().st_size
    assert path.read_bytes() == (server.root / "train" / "numbers-001.tar").read_bytes()
    spans = [span for name, span in server.asked if name.endswith("001.tar")]
    assert len(spans) == -(-size // RANGE) > 4
    assert server.at_once >= 4


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("fault", ["", "500", "html", "cut", "stall"])
def test_a_server_that_fails_for_a_while(
    fault: str, ranges: bool, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote_module, "STALL_SECONDS", 0.4)
    server.fault, server.failures, server.ranges = fault, 1 if fault == "stall" else 2, ranges
    found = source(server, tmp_path / "cache")
    for name in ("numbers-003.tar", "numbers-003.tar.idx", "numbers-001.tar"):
        assert found.locate(name).read_bytes() == (server.root / "train" / name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "HTTP 500"),
        ("html", "found 38 bytes, beginning with b'<html>"),
        ("cut", "ClientPayloadError"),
        ("stall", "no answer in time"),
        ("403", "HTTP 403"),
    ],
)
def test_a_server_that_fails_for_good(
    fault: str, said: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote_module, "STALL_SECONDS", 0.4)
    found = source(server, tmp_path / "cache")
    server.fault, server.failures = fault, 10**6
    with pytest.raises(DataError) as error:
        found.locate("numbers-003.tar")
    for part in (said, f"{server.url}/train/numbers-003.tar", "check the address"):
        assert part in str(error.value)
    tries = sum(n for (path, _), n in server.asked.items() if path.endswith(".tar"))
    assert tries == (1 if fault == "403" else 4)
    assert stored(tmp_path / "cache") == stored(tmp_path / "cache", "*.part") == []
    got = SampleReader(found.shards, found.locate).read(np.array([3]), np.array([0]))
    assert isinstance(got[0], DataError)


def test_a_shard_that_is_not_the_manifests(server: FileServer, tmp_path: Path) -> None:
    found = source(server, tmp_path / "cache")
    folder = server.root / "train"
    content = bytearray((folder / "numbers-001.tar").read_bytes())
    content[600] ^= 1
    (folder / "numbers-001.tar").write_bytes(content)
    (folder / "numbers-002.tar").unlink()
    with (folder / "numbers-005.tar").open("r+b") as file:
        file.truncate(1024)
    for number, said in ((1, "checksum"), (2, "is missing"), (5, "expected")):
        with pytest.raises(DataError, match=said):
            found.locate(f"numbers-00{number}.tar")
    assert stored(tmp_path / "cache") == []


def test_a_rewritten_data_set_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    assert read_all(source(server, tmp_path / "cache")) == WHOLE
    folder = server.root / "train"
    changed = bytearray((folder / "numbers-000.tar").read_bytes())
    changed[512] = ord("9")  # of the same size
    (folder / "numbers-000.tar").write_bytes(changed)
    entries = [build_index(path) for path in sorted(folder.glob("*.tar"))]
    Manifest(tuple(entries)).save(folder)
    assert read_all(source(server, tmp_path / "cache"))[0] == ("k000", {"txt": b"9"})


def test_a_damaged_cache_is_mended(server: FileServer, tmp_path: Path) -> None:
    found = source(server, tmp_path / "cache")
    with found.locate("numbers-001.tar").open("r+b") as file:
        file.truncate(100)
    assert read_all(found) == WHOLE


def test_least_recently_used_files_are_evicted(server: FileServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = source(server, cache, 45_000)
    sizes = {shard.name: shard.bytes for shard in found.shards}
    names = list(sizes)
    for name in names[:3]:
        found.locate(name)
        time.sleep(0.01)
    found.locate(names[0])  # used again
    held = SampleReader(found.shards, found.locate)
    assert held.read(np.array([1]), np.array([0])) == [WHOLE[3]]
    found.locate(names[0])
    for name in names[3:6]:
        found.locate(name)
        assert sum(path.stat().st_size for path in stored(cache, "*")) <= 45_000
    left = {path.name.partition("-")[2] for path in stored(cache)}
    assert names[2] not in left
    assert held.read(np.array([1]), np.array([9])) == [WHOLE[12]]  # evicted or not, an open file reads on
    assert read_all(found) == WHOLE
    with pytest.raises(DataError, match="cache_bytes is 9000"):
        source(server, cache, 9000).locate(names[4])


def test_files_evicted_while_they_are_opened(server: FileServer, tmp_path: Path) -> None:
    found = source(server, tmp_path / "cache")
    losses = [5]

    def locate(name: str) -> Path:
        path = found.locate(name)
        if losses[0] and losses[0] % 2:
            path.unlink()
        losses[0] -= losses[0] > 0
        return path

    got = SampleReader(found.shards, locate).read(np.array([1, 2]), np.array([0, 0]))
    assert got == [WHOLE[3], WHOLE[13]]


def _read(url: str, cache: Path, answer: Any) -> None:
    found = Source.open(f"{url}/train", cache)
    assert found is not None
    answer.put(read_all(found) == WHOLE)


def test_processes_share_one_cache(server: FileServer, tmp_path: Path) -> None:
    server.delay = 0.01
    context = mp.get_context("fork")
    answer = context.Queue()
    readers = [context.Process(target=_read, args=(server.url, tmp_path / "cache", answer)) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert [answer.get(timeout=60) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join()
    fetched = {at: n for at, n in server.asked.items() if not at[0].endswith("json")}
    assert set(fetched.values()) == {1}


def test_a_killed_process_leaves_no_lock_and_no_part(server: FileServer, tmp_path: Path) -> None:
    server.delay = 0.2
    context = mp.get_context("fork")
    reader = context.Process(target=_read, args=(server.url, tmp_path / "cache", context.Queue()))
    reader.start()
    while not stored(tmp_path / "cache", "*.tar.part"):
        assert reader.is_alive()
        time.sleep(0.005)
    os.kill(reader.pid or 0, signal.SIGKILL)
    reader.join()
    server.delay = 0.0
    assert read_all(source(server, tmp_path / "cache")) == WHOLE
    assert stored(tmp_path / "cache", "*.part") == []


@pytest.mark.distributed
def test_two_ranks_train_from_one_cache(server: FileServer, tmp_path: Path) -> None:
    data = {"cache_dir": tmp_path / "cache"}
    results = run(Stage(2, data=data, trainer={"max_epochs": 1}), server.url, tmp_path / "out")
    assert (ledger_of(results)[0] == 1).all()
    ids = sorted(i for rank in logged(tmp_path / "out", 2) for line in rank for i in line["ids"])
    assert ids == list(range(SAMPLES))
    shards = {at: n for at, n in server.asked.items() if at[0].endswith((".tar", ".idx"))}
    assert set(shards.values()) == {1}


def test_addresses_that_are_refused() -> None:
    for address, said in (
        ("ftp://host/data", "expected one of http://"),
        ("https://user:secret@host/data", "password or a token"),
        ("https://host/data?X-Amz-Signature=secret", "password or a token"),
    ):
        with pytest.raises(DataError, match=said) as error:
            Remote(address)
        assert "secret" not in str(error.value)


def test_missing_split_and_missing_package(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Source.open(f"{server.url}/val") is None
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"qm-lightning\[gcs\]"):
        Source.open("gs://bucket/train")


def test_a_page_instead_of_the_manifest(server: FileServer) -> None:
    (server.root / "train" / "index.json").write_text("<html>log in</html>")
    with pytest.raises(DataError, match="cannot be read"):
        Source.open(f"{server.url}/train")


def test_cache_names_do_not_collide(server: FileServer, tmp_path: Path) -> None:
    write_numbers(server.root / "other", (4, 5))
    other = Source.open(f"{server.url}/other", tmp_path / "cache")
    assert other is not None
    first, second = (
        other.locate("numbers-000.tar"),
        source(server, tmp_path / "cache").locate("numbers-000.tar"),
    )
    assert first != second
    assert isinstance(other.locate, ShardCache)
    assert first.stat().st_size == 10240 == second.stat().st_size
