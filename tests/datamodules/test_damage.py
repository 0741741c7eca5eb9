"""Every kind of damage that webdataset reads over in silence is refused when indexing, or masked and counted."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ddp_runs import SAMPLES, IdModule, write_numbers

from datamodules.__main__ import main
from datamodules.shards.manifest import Manifest

BLOCK = 512  # a sample of `write_numbers` is a header and a block of data
FIFTH = 4 * 2 * BLOCK  # where the fifth sample of the shard of ten begins
HTML = b"<html><body>503 Service Unavailable</body></html>"


def overwrite(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda shard: shard[:at] + new + shard[at + len(new) :]


# damage to a shard of ten samples -> what the indexer says of it, and how many samples remain at run time
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, int]] = {
    "cut inside data": (lambda s: s[: FIFTH + BLOCK + 100], "truncated member", 0),
    "cut inside a header": (lambda s: s[: FIFTH + 100], "truncated header", 0),
    "cut between two members": (lambda s: s[:FIFTH], "no end-of-archive marker", 0),
    "bad header": (overwrite(FIFTH, b"x" * BLOCK), "bad header checksum", 9),
    "one bit of a header": (overwrite(FIFTH + 3, b"?"), "bad header checksum", 9),
    "zeroed header": (overwrite(FIFTH, bytes(BLOCK)), "data after the end-of-archive marker", 9),
    "empty file": (lambda s: b"", "the file is empty", 0),
    "HTML page": (lambda s: HTML, "truncated header", 0),
    "HTML page of the same size": (lambda s: HTML.ljust(len(s)), "bad header checksum", 0),
}
CASES = pytest.mark.parametrize("name", DAMAGE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "train")
    return tmp_path


def damage(root: Path, change: Callable[[bytes], bytes]) -> Path:
    path = root / "train" / "numbers-001.tar"
    path.write_bytes(change(path.read_bytes()))
    return path


def archive(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"1"))


@CASES
def test_indexer_refuses_it(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, reason, _ = DAMAGE[name]
    path = damage(root, change)
    (root / "train" / "index.json").unlink()
    assert main(["index", str(root)]) == 2
    verdicts = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in verdicts] == [f"bad   {path}", "error"]
    assert reason in verdicts[0]
    assert not (root / "train" / "index.json").exists()
    assert main(["index", str(root), "--exclude-bad"]) == 0
    manifest = Manifest.load(root / "train")
    assert manifest.total == SAMPLES - 10
    assert manifest.excluded[0][0] == path.name


@CASES
def test_verify_finds_it(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damage(root, DAMAGE[name][0])
    assert main(["verify", str(root)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"bad   {path}"]
    assert out.splitlines()[-1].startswith(f"bad   {root}/train: 7 of 8 shards agree")


@CASES
def test_training_masks_and_counts_it(name: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def positions() -> dict[int, int]:
        module = IdModule(root, 4, on_error="skip", max_bad=10, max_bad_share=1.0)
        batches = list(module.train_dataloader())
        assert len(batches) == 13
        pairs = [(b["position"][b["valid"]], b["id"][b["valid"]]) for b in batches]
        return {p: i for at, ids in pairs for p, i in zip(at.tolist(), ids.tolist(), strict=True)}

    whole = positions()
    change, _, remaining = DAMAGE[name]
    damage(root, change)
    with caplog.at_level(logging.WARNING):
        left = positions()
    assert left.items() <= whole.items()  # no other sample has moved
    assert set(left.values()) >= set(range(SAMPLES)) - set(range(3, 13))
    assert len(left) == SAMPLES - 10 + remaining
    assert caplog.text.count("bad sample: sample") == 10 - remaining
    assert caplog.text.count("of numbers-001.tar") >= 10 - remaining


def test_only_the_checksum_shows_flipped_data(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damage(root, overwrite(FIFTH + BLOCK, b"9"))
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root), "--sha256"]) == 1
    assert f"bad   {path}: the checksum differs: bytes were changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("a.txt", "b.txt", "a.jpg"), "do not lie side by side"),
        (("a.txt", "a.TXT"), "has the field 'txt' twice"),
        ((".hidden", "folder/.gitignore"), "no sample in it"),
    ],
)
def test_samples_that_cannot_be_told_apart(
    names: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(tmp_path / "one.tar", *names)
    assert main(["index", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def test_missing_fields_are_found_when_indexing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(tmp_path / "pairs.tar", "a.jpg", "a.txt", "b.jpg", "c.jpg", "d.jpg", "d.txt")
    assert main(["index", str(tmp_path)]) == 0
    assert "note  " in (said := capsys.readouterr().err)
    assert "pairs.tar: 2 of 4 samples lack 'txt', first 'b'" in said
    assert Manifest.load(tmp_path).shards[0].fields == ("jpg",)
    assert main(["index", str(tmp_path), "--fields", "jpg,txt"]) == 2
    assert "bad   " in (said := capsys.readouterr().err)
    assert "2 of 4 samples lack 'txt', first 'b'" in said


def test_shards_that_came_or_went_after_indexing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(root / "train" / "new.tar", "z.txt")
    (root / "train" / "numbers-000.tar").unlink()
    (root / "train" / "numbers-002.tar.idx").write_bytes(b"12345")
    assert main(["verify", str(root)]) == 1
    verdicts = capsys.readouterr().err
    for part in ("000.tar: the file is missing", "002.tar.idx is no index", "new.tar: the manifest does not"):
        assert part in verdicts


def test_folders_without_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(tmp_path)]) == 2
    assert "no *.tar under" in capsys.readouterr().err
    (tmp_path / "a.tar.gz").touch()
    assert main(["index", str(tmp_path)]) == 2
    assert "compressed shards" in capsys.readouterr().err
    assert main(["verify", "s3://bucket/data"]) == 2
    assert "index shards before they are uploaded" in capsys.readouterr().err
    archive(tmp_path / "a.tar", "x.txt")
    assert main(["verify", str(tmp_path)]) == 2
    assert "python -m datamodules index" in capsys.readouterr().err


def test_several_processes_say_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damage(root, DAMAGE["bad header"][0])
    assert main(["verify", str(root), "--sha256", "--workers", "2"]) == 1
    assert f"bad   {path}: bad header checksum" in capsys.readouterr().err
    assert main(["index", str(root), "--exclude-bad", "--workers", "2"]) == 0
    assert f"bad   {path}: bad header checksum" in capsys.readouterr().err
    manifest = Manifest.load(root / "train")
    assert (manifest.total, len(manifest.shards)) == (SAMPLES - 10, 7)
    assert [shard.name for shard in manifest.shards] == sorted(shard.name for shard in manifest.shards)
