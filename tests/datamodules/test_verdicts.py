"""What `index`, `verify` and `prepare` say: one line for each thing that is wrong, and no split is passed over."""

from __future__ import annotations

import errno
import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from datamodules.__main__ import main
from datamodules.errors import DataError
from datamodules.shards import progress
from datamodules.shards.manifest import Manifest
from datamodules.shards.processes import map_files
from datamodules.shards.source import absence_of

PREPARE = ["prepare", "image", "--source", "digits", "--workers", "1"]


def archive(path: Path, *names: str, links: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"1"))
        for name in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, names[0]
            tar.addfile(member)
    return path


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(bytes(2000)), "compressed with gzip"),
        (b"PK\x03\x04" + bytes(2000), "a zip archive"),
        (b"\n <!DOCTYPE html><title>403</title>".ljust(2000), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
def test_what_a_file_is_that_is_no_shard(
    content: bytes, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert main(["index", str(tmp_path)]) == 2
    assert f"it is {kind}" in said(capsys)[0]


def test_a_link_that_leads_nowhere_and_a_folder_named_like_a_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(tmp_path / "a.tar", "x.txt")
    (tmp_path / "b.tar").symlink_to("/nowhere.tar")
    (tmp_path / "c.tar").mkdir()
    assert main(["index", str(tmp_path), "--exclude-bad"]) == 0
    assert said(capsys) == [
        f"bad   {tmp_path}/b.tar: a link to a file that is not there",
        f"bad   {tmp_path}/c.tar: Is a directory",
    ]
    assert Manifest.load(tmp_path).total == 1


def test_members_that_hold_no_bytes_are_not_lost_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive(tmp_path / "a.tar", "x.jpg", links=("y.jpg", "z.jpg", "README"))
    many = archive(tmp_path / "b.tar", *(f"{i}.jpg" for i in range(40)), links=("y.jpg",))
    assert main(["index", str(tmp_path)]) == 0
    assert said(capsys) == [
        f"note  {path}: 2 members are links or other special files, which are not read, first 'y.jpg'",
        f"note  {many}: 1 members are links or other special files, which are not read, first 'y.jpg'",
    ]


def test_what_only_a_look_at_all_shards_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(tmp_path / "a.tar", "1.jpg", "1.txt")
    archive(tmp_path / "b.tar", "2.jpg")  # a whole shard without captions
    archive(tmp_path / "c.tar", "3.v1.jpg", "3.v2.jpg")  # two pictures that the dot makes one sample
    (tmp_path / "d.tar.gz").touch()
    assert main(["index", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    for line in (
        "2 of 3 shards have no 'txt' at all, first b.tar",
        "1 of 3 shards have no 'jpg' at all, first c.tar",
        "2 of 3 shards have no 'v1.jpg' at all, first a.tar",
        "1 compressed archives are not read, first d.tar.gz",
    ):
        assert f"note  {tmp_path}: {line}" in err
    assert "3 shards, 3 samples which have no field in common" in out


def test_every_split_is_indexed_and_verified_whatever_another_one_comes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("test", "train", "val"):
        archive(tmp_path / split / "a.tar", "1.jpg", "1.txt")
    good = (tmp_path / "test" / "a.tar").read_bytes()
    (tmp_path / "test" / "a.tar").write_bytes(b"")
    assert main(["index", str(tmp_path)]) == 2
    out, _ = capsys.readouterr()
    assert f"good  {tmp_path}/train: 1 shards, 1 samples each with jpg, txt; fingerprint" in out
    assert f"good  {tmp_path}/val" in out
    assert not (tmp_path / "test" / "index.json").exists()
    (tmp_path / "test" / "a.tar").write_bytes(good)
    (tmp_path / "val" / "a.tar").unlink()  # nothing is left of this split but its manifest
    assert main(["verify", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert f"error: {tmp_path}/test has 1 shards and no index.json" in err
    assert f"bad   {tmp_path}/val/a.tar: the file is missing" in err
    assert f"good  {tmp_path}/train: 1 of 1 shards agree (sizes, headers and index; --sha256" in out


def test_a_place_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path / "a.tar", "x.txt")
    for verb in ("index", "verify"):
        assert main([verb, str(path)]) == 2
        assert main([verb, str(tmp_path / "none")]) == 2
        first, second = said(capsys)
        assert f"{path} is a file, expected a folder" in first
        assert f"{tmp_path}/none does not exist, expected a folder" in second


def test_verdicts_stay_one_line_beside_a_bar_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(stderr=True, force_terminal=True, width=40)
    monkeypatch.setattr(progress, "_console", lambda: console)
    archive(tmp_path / "good.tar", "x.txt")
    bad = tmp_path / f"{'long' * 20}:smile:[red].tar"
    bad.touch()
    assert main(["index", str(tmp_path), "--exclude-bad"]) == 0
    out, err = capsys.readouterr()
    assert f"bad   {bad}: the file is empty\n" in err
    assert "indexing" in err
    assert [line[:4] for line in out.splitlines()] == [
        "good"
    ]  # so that `index DIR > log` keeps the verdict alone


@pytest.mark.parametrize("options", [["--shard_size", "0"], ["--train", "0", "--val", "0", "--test", "0"]])
def test_nothing_to_write_leaves_the_folder_free(options: list[str], tmp_path: Path) -> None:
    assert main([*PREPARE, "--out", str(tmp_path / "set"), *options]) == 2
    assert not (tmp_path / "set").exists()  # else the same command with better numbers would be refused


def test_fewer_than_no_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*PREPARE, "--out", str(tmp_path), "--train", "-1"])
    assert "found -1, expected 0 or more" in capsys.readouterr().err


def test_an_interrupted_prepare_is_not_made_complete_by_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prepared.json").write_text("{}")
    archive(tmp_path / "train" / "train-000000-of-000002.tar", "1.txt")
    reason = (
        f"{tmp_path}/train has 1 of 2 shards: prepare was interrupted there; give the same prepare command"
    )
    for verb in ("verify", "index"):
        assert main([verb, str(tmp_path)]) == 2
        assert reason in said(capsys)[0]
    assert reason in absence_of(str(tmp_path), "train")
    assert not (tmp_path / "train" / "index.json").exists()
    archive(tmp_path / "train" / "train-000001-of-000002.tar", "2.txt")
    assert main(["index", str(tmp_path)]) == 0  # all are there


def test_a_full_disk_and_an_interruption_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(with_what: BaseException) -> None:
        def write(*_: object) -> None:
            raise with_what

        monkeypatch.setattr("datamodules.sources.writing.write_atomic", write)

    stop(OSError(errno.ENOSPC, "No space left on device"))
    assert main([*PREPARE, "--out", str(tmp_path)]) == 2
    stop(KeyboardInterrupt())
    assert main([*PREPARE, "--out", str(tmp_path)]) == 130
    assert main([*PREPARE, "--out", str(Path(__file__))]) == 2
    full, stopped, file = said(capsys)
    assert full.startswith("error: No space left on device; expected room")
    assert stopped == "stopped; the same command goes on: what is finished is kept"
    assert file.startswith(f"error: File exists: {__file__}")


def test_a_worker_that_is_killed_is_an_error_of_one_line() -> None:
    with pytest.raises(DataError, match=r"one of 2 worker processes was killed.*fewer --workers"):
        list(map_files(os._exit, [1, 1], 2))


def test_an_interruption_is_for_the_parent_to_report(tmp_path: Path) -> None:
    # When two are done one worker is busy for two seconds, the other one waits for work or is still starting.
    code = (
        "import os, signal, time; from datamodules.shards.processes import map_files\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "for i, _ in enumerate(map_files(time.sleep, [0, 0, 2], 2)):\n"
        "    if i == 1: os.killpg(0, signal.SIGINT)  # what Ctrl-C does"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        _, err = process.communicate(timeout=100)
    assert err.count("Traceback") == 1  # the parent's, which `main` turns into a line
    assert "SpawnProcess" not in err
