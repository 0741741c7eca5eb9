"""Reading headers many at a time says what reading them one by one says, of whole and of damaged archives."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.shards import walk as walk_module
from datamodules.shards import windows as windows_module
from datamodules.shards.scan import Scan, scan
from datamodules.shards.tar import CorruptShardError, split_key, split_keys

NAMES = st.text("ab./_é\nX-", min_size=1, max_size=12) | st.sampled_from(
    [
        "__a__",
        "__a__/b.txt",
        "a/__b__/c.txt",
        ".hidden",
        "a/.b",
        "x" * 120 + ".txt",
        "d/" * 80 + "k.txt",
        "a.b.C",
    ]
)
MEMBERS = st.lists(
    st.tuples(NAMES.filter(lambda name: not name.endswith("/")), st.integers(0, 1500)), max_size=20
)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
ODD = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def archive(members: list[tuple[str, int]], file_format: int, mtime: float) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=file_format) as tar:
        for name, size in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = size, mtime
            try:
                tar.addfile(entry, io.BytesIO(bytes(size)))
            except ValueError:  # too long for this format
                continue
    return out.getvalue()


def verdict(path: Path, checksum: bool) -> Scan | str:
    try:
        return scan(path, checksum=checksum)
    except CorruptShardError as error:
        return str(error)


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, int], Scan | str]:
    """The verdict on an archive read in blocks of a size, after a look that it is that of reading header by header."""
    plain = walk_module._plain
    monkeypatch.setattr(walk_module, "_FEW", 1)
    monkeypatch.setattr(walk_module, "_ODD_STEPS", 1)

    def compared(content: bytes, window: int) -> Scan | str:
        path = tmp_path / "a.tar"
        path.write_bytes(content)
        monkeypatch.setattr(windows_module, "WINDOW", window)
        monkeypatch.setattr(walk_module, "_plain", plain)
        many = [verdict(path, checksum) for checksum in (False, True)]
        monkeypatch.setattr(walk_module, "_plain", lambda *_: 0)
        one = verdict(path, False)
        assert many[0] == one
        digest = hashlib.sha256(content).hexdigest()
        assert many[1] == (one if isinstance(one, str) else one._replace(sha256=digest))
        return one

    return compared


@ODD
@given(
    members=MEMBERS, file_format=FORMATS, mtime=st.sampled_from([0, 1.5]), window=st.sampled_from([512, 4096])
)
def test_whole_archives(
    members: list[tuple[str, int]],
    file_format: int,
    mtime: float,
    window: int,
    compare: Callable[[bytes, int], Scan | str],
) -> None:
    content = archive(members, file_format, mtime)
    found = compare(content, window)
    if isinstance(found, Scan):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            stored = [split for entry in tar if (split := split_key(entry.name))]
        assert found.keys == [key for i, (key, _) in enumerate(stored) if not i or stored[i - 1][0] != key]


@ODD
@given(
    members=MEMBERS.filter(len),
    file_format=FORMATS,
    at=st.floats(0, 1, exclude_max=True),
    new=st.sampled_from([b"", b"7", b"-", b" 10", b"_1", b"\x80\0\0\0", bytes(512), b"x" * 600, b"\xff"]),
    field=st.sampled_from([None, 0, 100, 124, 148, 156, 257, 345]),
    cut=st.booleans(),
)
def test_damaged_archives(
    members: list[tuple[str, int]],
    file_format: int,
    at: float,
    new: bytes,
    field: int | None,
    cut: bool,
    compare: Callable[[bytes, int], Scan | str],
) -> None:
    """Bytes overwritten anywhere, or in a field of some block; cut there, or not."""
    content = archive(members, file_format, 0)
    place = int(at * len(content))
    place = place if field is None else place // 512 * 512 + field
    compare(content[:place] + new + (b"" if cut else content[place + len(new) :]), 2048)


@settings(deadline=None)
@given(names=st.lists(NAMES, max_size=8))
def test_names_split_together_as_one_by_one(names: list[str]) -> None:
    assert split_keys(names) == [split_key(name) or ("", "") for name in names]


@pytest.mark.parametrize(("kind", "reason"), [(tarfile.DIRTYPE, None), (tarfile.REGTYPE, "can't decode")])
def test_names_that_are_no_text(kind: bytes, reason: str | None, tmp_path: Path) -> None:
    """A folder's name does not matter; a file's does."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("a.txt", "é.txt", "b.txt"):
            entry = tarfile.TarInfo(name)
            entry.type = kind if name[0] == "é" else tarfile.REGTYPE
            tar.addfile(entry, io.BytesIO(b""))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    found = verdict(tmp_path / "a.tar", checksum=False)
    if reason is None:
        assert isinstance(found, Scan)
        assert found.keys == ["a", "b"]
    else:
        assert reason in str(found)


def test_a_size_below_zero_ends(tmp_path: Path) -> None:
    """A header that leads back to itself is no reason to wait."""
    content = bytearray(archive([("a.txt", 10)], tarfile.USTAR_FORMAT, 0))
    content[124:135] = b"-0000001000"
    (tmp_path / "a.tar").write_bytes(content)
    assert "checksum" in str(verdict(tmp_path / "a.tar", checksum=True))


def test_a_file_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive([(f"{i}.txt", 1000) for i in range(9)], tarfile.USTAR_FORMAT, 0))
    monkeypatch.setattr(windows_module, "WINDOW", 4096)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, size, at) if at < 8192 else b"")
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, buffers, at) if at < 8192 else 0)
    for checksum in (False, True):
        assert "at byte" in str(verdict(path, checksum))


def test_large_members_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checksum their bytes are not read."""
    path = tmp_path / "a.tar"
    path.write_bytes(archive([(f"{i}.bin", 300_000) for i in range(20)], tarfile.USTAR_FORMAT, 0))
    monkeypatch.setattr(windows_module, "WINDOW", 1 << 20)
    read = [0]
    pread, preadv = os.pread, os.preadv

    def counted_pread(fd: int, size: int, at: int) -> bytes:
        got = pread(fd, size, at)
        read[0] += len(got)
        return got

    def counted_preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        got = preadv(fd, buffers, at)
        read[0] += got
        return got

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    assert len(scan(path).keys) == 20
    assert read[0] < 1.4e6
