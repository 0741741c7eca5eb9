"""Shards from elsewhere, used where they lie: other names, nested keys, packed members, one flat folder."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datamodules import ImageDataModule, TextDataModule
from datamodules.__main__ import main
from datamodules.errors import DataError
from datamodules.sources.encoding import png_bytes

PICTURE = png_bytes(np.full((8, 8), 7, np.uint8))


def write(path: Path, members: dict[str, bytes], file_format: int = tarfile.GNU_FORMAT) -> None:
    """A shard as another tool makes it, with folders as entries of their own."""
    with tarfile.open(path, "w", format=file_format) as tar:
        seen: set[str] = set()
        for name, content in members.items():
            if "/" in name and (folder := name.rpartition("/")[0]) not in seen:
                seen.add(folder)
                entry = tarfile.TarInfo(folder)
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_a_flat_folder_of_foreign_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a/" + "very-long-folder-name/" * 8
    for part in range(3):
        members = {}
        for i in range(4):
            key = f"{long if i % 2 else './x/'}{part}_{i}"
            members |= {
                f"{key}.Image.PNG": PICTURE,
                f"{key}.cap.txt.gz": gzip.compress(f"no {part}{i}".encode()),
            }
        write(tmp_path / f"laion-{part}.tar", members, (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[part % 2])
    before = {p: p.read_bytes() for p in tmp_path.glob("*.tar")}
    splits = ["--split", "train=laion-[01].tar", "--split", "test=laion-2.tar"]
    assert main(["index", str(tmp_path), *splits]) == 0
    assert main(["index", str(tmp_path), *splits]) == 0  # again
    assert {p: p.read_bytes() for p in tmp_path.glob("*.tar")} == before
    assert main(["verify", str(tmp_path / "train"), "--sha256"]) == 0
    assert (
        main(["verify", str(tmp_path)]) == 0
    )  # the shards themselves lie here, and have their index in the splits
    assert main(["index", str(tmp_path)]) == 0
    assert not (tmp_path / "index.json").exists()
    rename = {"png": "image.png", "txt": "cap.txt"}
    data = ImageDataModule(tmp_path, 4, size=8, targets="text", rename=rename)
    batch = next(iter(data.test_dataloader()))
    assert [data.decode_targets(t) for t in batch["targets"]] == [f"no 2{i}" for i in range(4)]
    assert batch["keys"][1] == f"{long}2_1"
    assert len([k for b in data.train_dataloader() for k in b["keys"]]) == 8
    text = TextDataModule(tmp_path, 4, rename={"txt": "cap.txt", "target.txt": "cap.txt"})
    assert text.decode_targets(next(iter(text.test_dataloader()))["targets"][0]) == "no 20"
    with pytest.raises(DataError, match=r"no nowhere\.png among cap\.txt, image\.png.*mend rename"):
        next(iter(ImageDataModule(tmp_path, 4, size=8, rename={"png": "nowhere.png"}).test_dataloader()))
    with pytest.raises(DataError, match=r"lack words\.txt"):
        TextDataModule(tmp_path, 4, rename={"txt": "words.txt"}).test_dataloader()


def test_packed_members_without_a_table(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    write(
        tmp_path / "test" / "any name.tar",
        {"1.png.gz": gzip.compress(PICTURE), "1.txt.gz": gzip.compress(b"owl")},
    )
    assert main(["index", str(tmp_path)]) == 0
    data = ImageDataModule(tmp_path, 1, size=8, targets="text")
    assert data.decode_targets(next(iter(data.test_dataloader()))["targets"][0]) == "owl"


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["training=*.tar"], "expected train=PATTERN"),
        (["train=/etc/*.tar"], "expected train=PATTERN"),
        (["train=z*.tar"], "fits 'z"),
        (["train=a*.tar", "val=*.tar"], "in two splits"),
        (["train=**/*.tar"], "name of another shard"),
    ],
)
def test_bad_splits(
    splits: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.tar", "b.tar", "sub/b.tar"):
        write(tmp_path / name, {"1.txt": b"x"})
    options = [part for split in splits for part in ("--split", split)]
    assert main(["index", str(tmp_path), *options]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.rglob("index.json"))
