"""Shards are the same bytes however they were made, a kill leaves nothing that reads as complete, and a restart
goes on where the last run stopped."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.shards.index import build_index
from datamodules.shards.manifest import Manifest
from datamodules.shards.source import Source
from datamodules.shards.writer import write_shards


@dataclass(frozen=True)
class Numbers:
    """Samples that say their number; `pause` seconds each, and a note of each in `log`."""

    count: int
    pause: float = 0.0
    log: str | None = None
    size: int = 10

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, bytes]:
        time.sleep(self.pause)
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{index}\n")
        return {"__key__": f"k{index:04d}".encode(), "txt": str(index).encode().ljust(self.size)}


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write(out: Path, source: object, workers: int = 1) -> Manifest:
    return write_shards(out, "train", source, shard_size=8, fields=["txt"], workers=workers, progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run by one process writes."""
    out = tmp_path_factory.mktemp("whole")
    assert write(out, Numbers(50)).total == 50
    return contents(out / "train")


def test_bytes_do_not_depend_on_the_number_of_processes(finished: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, Numbers(50), workers=3)
    assert contents(tmp_path / "train") == finished
    assert len(finished) == 7 * 3 + 1


def test_checksums_are_those_of_the_manifest(tmp_path: Path) -> None:
    for entry in write(tmp_path, Numbers(50)).shards:
        path = tmp_path / "train" / entry.name
        assert path.with_name(f"{entry.name}.sha256").read_text() == f"{entry.sha256}  {entry.name}\n"
        assert build_index(path) == entry


@pytest.mark.parametrize("manifest", [True, False], ids=["with manifest", "without manifest"])
def test_restart_writes_only_what_is_missing_or_wrong(
    manifest: bool, finished: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, Numbers(50))
    folder, log = tmp_path / "train", tmp_path / "log"
    if not manifest:
        (folder / "index.json").unlink()
    shards = sorted(folder.glob("*.tar"))
    shards[1].unlink()
    shards[2].with_name(shards[2].name + ".idx").write_bytes(bytes(16))
    shards[3].with_name(shards[3].name + ".sha256").unlink()
    content = bytearray(shards[4].read_bytes())
    content[600] ^= 1  # a bit of data, which only the checksum shows
    shards[4].write_bytes(content)
    write(tmp_path, Numbers(50, log=str(log)))
    assert [int(n) for n in log.read_text().split()] == list(range(8, 40))
    assert contents(folder) == finished


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, Numbers(50))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "train").iterdir() if p.name != "index.json"}
    write(tmp_path, Numbers(50, log=str(tmp_path / "log")))
    assert not (tmp_path / "log").exists()
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "train").iterdir() if p.name != "index.json"}
    assert after == before


PATHS = (Path(__file__).parent, Path(__file__).parents[2])  # for imports in a process of its own
RUN = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_writer import Numbers, write
if __name__ == "__main__":
    write(Path(sys.argv[1]), Numbers(50, pause=0.004), workers=1)
"""


@pytest.mark.parametrize("shards", [0, 3, 6])
def test_killed_at_any_moment(shards: int, finished: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL once some shards lie there, in the place of an older, complete set."""
    out = tmp_path / "out"
    folder = out / "train"
    write(out, Numbers(50, size=20))
    for path in folder.glob("*.sha256"):
        path.unlink()  # another data set, so all has to be written anew
    script = tmp_path / "run.py"
    script.write_text(RUN)
    process = subprocess.Popen([sys.executable, script, out, *PATHS])
    try:
        while len(list(folder.glob("*.sha256"))) < shards or (folder / "index.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "index.json").exists()
    assert Source.open(str(folder)) is None
    write(out, Numbers(50))
    assert contents(folder) == finished


@pytest.mark.slow
def test_workers_end_with_their_killed_parent(finished: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("workers=1", "workers=2"))
    process = subprocess.Popen([sys.executable, script, tmp_path / "out", *PATHS])
    folder = tmp_path / "out" / "train"
    while not list(folder.glob("*.sha256")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()
        for child in children
    ):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.05)
    write(tmp_path / "out", Numbers(50))
    assert contents(folder) == finished


def test_fewer_shards_than_before(tmp_path: Path) -> None:
    write(tmp_path, Numbers(50))
    write(tmp_path, Numbers(20))
    assert Manifest.load(tmp_path / "train").total == 20
    assert len(list((tmp_path / "train").glob("*.tar*"))) == 3 * 3


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"__key__": b"img.v1", "jpg": b""}, "a key without a dot"),
        ({"__key__": b"a", "TXT": b""}, "lower-case fields"),
        ({"__key__": b"a"}, r"the fields \[\]"),
        ({"__key__": b"a", "jpg": b""}, r"lacks the fields \['txt'\]"),
    ],
)
def test_bad_samples_are_refused(sample: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        write(tmp_path, [sample])
    assert not (tmp_path / "train" / "index.json").exists()


def test_keys_are_unique_over_the_split(tmp_path: Path) -> None:
    samples = [Numbers(20)[i] for i in range(20)]
    samples[18]["__key__"] = b"k0003"
    with pytest.raises(DataError, match=r"'k0003' occurs in train-000000-of-000003.tar and in train-000002"):
        write(tmp_path, samples)
    assert not (tmp_path / "train" / "index.json").exists()
    samples[18]["__key__"] = b"k0018"
    write(tmp_path, samples)  # the shard with the mended key is written anew
    write(tmp_path / "other", Numbers(20))
    assert contents(tmp_path / "train") == contents(tmp_path / "other" / "train")
    samples[7]["__key__"] = b"k0000"
    with pytest.raises(DataError, match="occurs twice, again at sample 7"):
        write(tmp_path / "third", samples)


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no samples"):
        write(tmp_path, Numbers(0))


def test_index_is_the_layout_that_energon_reads(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, Numbers(5)).shards
    offsets = np.fromfile(tmp_path / "train" / f"{entry.name}.idx", "<u8")
    assert offsets.tolist() == [0, 1024, 2048, 3072, 4096, 5120]
