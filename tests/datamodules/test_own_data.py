"""Anyone's pictures, texts and clips become shards: nothing is lost unseen, and an interruption costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules import ImageDataModule, PairedDataModule, TextDataModule, VideoDataModule
from datamodules.__main__ import main
from datamodules.shards.manifest import Manifest
from datamodules.sources.own.text import boundary

ROOT = Path(__file__).parents[2]


def save(path: Path, size: tuple[int, int] = (12, 10), mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.RandomState(len(str(path))).randint(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)


def samples(folder: Path, data: Any) -> dict[str, str]:
    """Target text by key, over all splits, real samples only."""
    found = {}
    for split in ("train", "val", "test"):
        if (folder / split).is_dir():
            data.predict_split = split
            for batch in data.predict_dataloader():
                for i, key in enumerate(batch["keys"]):
                    if batch["valid"][i]:
                        found[key] = data.decode_targets(batch["targets"][i])
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        save(root / "red fox" / f"a.{i}.jpg")
        save(root / "owl" / f"b{i}.png", mode=["L", "RGB", "RGBA", "P", "1", "LA"][i])
    save(root / "owl" / "cmyk.jpg", mode="CMYK")
    save(root / "owl" / "b0.webp")  # the same stem as b0.png
    save(root / "owl" / "old.bmp")
    save(root / "owl" / "scan.tiff", mode="L")
    Image.fromarray(np.full((4, 4), 51200, np.uint16)).save(root / "owl" / "deep.tif")
    data = (root / "red fox" / "a.0.jpg").read_bytes()
    (root / "owl" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (root / "owl" / "none.png").write_bytes(b"")
    (root / "owl" / "page.jpg").write_bytes(b"<html>not found</html>")
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(root / "owl" / "moving.gif", save_all=True, append_images=frames[1:])
    save(root / "loose.png")
    (root / ".cache").mkdir()
    save(root / ".cache" / "hidden.png")
    return root


def test_class_folders(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "prepare",
        "image",
        "--source",
        str(pictures),
        "--out",
        str(out),
        "--workers",
        "1",
        "--shard_size",
        "4",
    ]
    assert main([*command, "--val_share", "0.2", "--test_share", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "17 samples found, 5 files or records skipped" in said
    reasons = {
        r["name"]: r["reason"] for r in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    }
    assert reasons == {
        "loose.png": "no text",
        "owl/cut.jpg": "damaged",
        "owl/moving.gif": "refused",
        "owl/none.png": "file is empty",
        "owl/page.jpg": "not a picture",
    }
    assert "1 x damaged, such as owl/cut.jpg" in said
    found = samples(out, ImageDataModule(out, 4, size=8, targets="text"))
    assert len(found) == 17
    assert found["red fox/a_3"] == "red fox"
    assert {found[k] for k in ("owl/b0", "owl/b0-2", "owl/deep", "owl/scan", "owl/cmyk")} == {"owl"}
    assert main(["verify", str(out), "--sha256"]) == 0
    # again: nothing is checked or written anew
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    assert main([*command, "--val_share", "0.2", "--test_share", "0.2"]) == 0
    assert "22 of 22 files were checked by an earlier run" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")} == before
    # another split of the same pictures must not be mixed in; it is refused before anything is read or overwritten
    (out / "skipped.jsonl").write_text("mine")
    assert main([*command, "--val_share", "0.3"]) == 2
    said = capsys.readouterr()
    assert "prepared with another test_share (0.2, now 0.05), val_share (0.2, now 0.3); " in said.err
    assert "samples found" not in said.out
    assert (out / "skipped.jsonl").read_text() == "mine"


def test_files_that_nobody_reads_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("owl/a.jpg", "owl/b.png"):
        save(tmp_path / "in" / name)
    for name in (
        "owl/phone.HEIC",
        "owl/phone2.heic",
        "owl/paper.pdf",
        "owl/a.txt",
        "owl/.DS_Store",
        "README",
    ):
        (tmp_path / "in" / name).write_text("x")
    assert main(["prepare", "image", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "4 files left aside, their endings are not read: 2 .heic, 1 .pdf, 1 without an ending" in said


def test_other_files_than_before_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in/owl/a.jpg")
    command = ["prepare", "image", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    save(tmp_path / "in/owl/b.jpg")
    assert main(command) == 2
    assert "prepared with another set of files" in capsys.readouterr().err


def prepare_captioned(kind: str, source: Path, table: Path, out: Path) -> list[str]:
    """The command for a table of captions, all samples for training."""
    files = ["--source", str(source), "--captions", str(table), "--out", str(out)]
    return ["prepare", kind, *files, "--val_share", "0", "--test_share", "0"]


def test_each_row_of_a_table_is_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captioned collections have several captions for a picture; the last one must not win unseen."""
    save(tmp_path / "in" / "a.jpg")
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("file,caption\n./a.jpg,a fox\na.jpg,a red fox\n")
    assert main(prepare_captioned("paired", tmp_path / "in", table, out)) == 0
    assert "2 samples found, 0 files" in capsys.readouterr().out
    assert samples(out, PairedDataModule(out, 2, size=8)) == {"a": "a fox", "a-2": "a red fox"}


def test_sixteen_bits_are_kept_until_read(pictures: Path, tmp_path: Path) -> None:
    from datamodules.shards.decode import decode_field
    from datamodules.sources.own.image import load_picture

    sample = {"path": str(pictures / "owl" / "deep.tif"), "as": "png", "text": "owl"}
    assert decode_field("png", load_picture(sample)["png"])[0, 0].tolist() == [200, 200, 200]


def test_bad_files_can_stop_it(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "prepare",
        "image",
        "--source",
        str(pictures),
        "--out",
        str(tmp_path / "o"),
        "--on_error",
        "raise",
    ]
    assert main([*command, "--workers", "1"]) == 2
    assert "error: loose.png: no text" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tar"))


def test_captions_from_a_table_and_splits_from_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for i in range(5):
        save(source / f"{i}.jpg")
    table = tmp_path / "t.csv"
    table.write_text(
        "path,words,split\n0.jpg,a red fox,train\n1.jpg,an owl,train\n2.jpg,,train\n3.jpg,a ship,val\n9.jpg,x,val\n"
    )
    out = tmp_path / "out"
    command = ["prepare", "paired", "--source", str(source), "--out", str(out), "--captions", str(table)]
    assert main(command) == 2
    assert "has the columns path, words, split and lacks file, caption" in capsys.readouterr().err
    assert main([*command, "--file_column", "path", "--caption_column", "words", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    for line in (
        "1 x text is empty, such as 2.jpg",
        "1 x no text, such as 4.jpg",
        "1 x file is missing, such as 9.jpg",
    ):
        assert line in said
    assert {s: Manifest.load(out / s).total for s in ("train", "val")} == {"train": 2, "val": 1}
    assert samples(out, PairedDataModule(out, 2, size=8)) == {"0": "a red fox", "1": "an owl", "3": "a ship"}


def test_texts_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    long = "Grüße aus Ærø, 日本 und anderswo. " * 9
    (source / "long.txt").write_text(long, "utf-8")
    (source / "short.txt").write_text("too short")
    (source / "empty.txt").write_text(" \n")
    (source / "latin.txt").write_bytes("Grüße".encode("latin-1") * 50)
    records = [
        {"text": "two and two", "target": "four"},
        {"text": "", "target": "x"},
        {"text": "one", "target": ""},
        {"body": "x"},
        {"text": "half \ud800", "target": "x"},
        {"text": long},
    ]
    lines = [json.dumps(r).encode() for r in records]
    (source / "r.jsonl").write_bytes(b"\n".join([*lines, b"{broken", b'{"text": "\xff"}', b""]))
    out = tmp_path / "out"
    command = ["prepare", "text", "--source", str(source), "--out", str(out), "--context_bytes", "32"]
    command += ["--target_bytes", "8", "--workers", "1", "--val_share", "0", "--test_share", "0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    reasons = [r["reason"] for r in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())]
    assert sorted(reasons) == [
        "no field 'text'",
        "not JSON",
        "target is empty",
        *["text is empty"] * 2,
        "text is not UTF-8",
        "text is not UTF-8",
        "text is not Unicode",
        "text is too short",
    ]
    passages = len(long.encode()) // 40
    assert f"{2 * passages + 1} samples found, 9 files or records skipped" in said
    data = TextDataModule(out, 4, shuffle=False)
    read = {}
    for batch in data.train_dataloader():
        for i, key in enumerate(batch["keys"]):
            real = batch["inputs"]["attention_mask"][i].bool()
            read[key] = bytes(batch["inputs"]["input_ids"][i][real].tolist()), batch["targets"][i]
    whole = b"".join(
        read[f"long_txt-{i:06d}"][0] + data.decode_targets(read[f"long_txt-{i:06d}"][1]).encode()
        for i in range(passages)
    )
    assert long.encode().startswith(whole)
    assert len(whole) > 40 * passages - 4
    assert (b"two and two", "four") in [(c, data.decode_targets(t)) for c, t in read.values()]


def test_a_large_jsonl_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.sources.own import text

    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"q{i}" * (i % 5 + 1), "target": str(i)}) + "\n" for i in range(40))
    )
    seen = {}
    for size in (1 << 20, 50, 7):
        monkeypatch.setattr(text, "CHUNK", size)
        items = [
            {**i, "context": 8, "target": 8, "fields": ["text", "target"]} for i in text.text_items(path, ())
        ]
        found = [f for item in items for f in text.check_text(item)]
        seen[size] = [text.load_text(f.sample)["target.txt"].decode() for f in found if f.sample]
        assert seen[size] == [str(i) for i in range(40)]


def test_boundaries_lie_between_characters() -> None:
    text = "aé日".encode()
    assert [boundary(text, at) for at in range(7)] == [0, 1, 1, 3, 3, 3, 6]


def test_clips_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for clip in ("whole", "uneven", "unnamed"):
        for f in range(3):
            save(tmp_path / "in" / clip / f"{f}.png", (8 + (clip == "uneven" and f == 2), 8))
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("file,caption\nwhole/,waves\nuneven,waves\ngone.mp4,lost\n")
    assert main(prepare_captioned("video", tmp_path / "in", table, out)) == 0
    said = capsys.readouterr().out
    for line in (
        "1 samples found, 3 files or records skipped",
        "1 x file is missing, such as gone.mp4 (the table names it)",
        "1 x frames differ in size, such as uneven (0.png is 8 x 8, 2.png is 9 x 8)",
        "1 x no text, such as unnamed",
    ):
        assert line in said


def test_frame_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    for split, clips in (("train", 3), ("validation", 1)):
        for clip in range(clips):
            for f in (1, 2, 10, 9):
                save(source / split / "waves" / f"c{clip}" / f"f{f}.png", (8, 8), "L")
    save(source / "train" / "fire" / "short" / "0.png", (8, 8))
    for f in range(4):
        save(source / "train" / "fire" / "broken" / f"{f}.jpg", (8, 8))
    (source / "train" / "fire" / "broken" / "2.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "out"
    command = [
        "prepare",
        "video",
        "--source",
        str(source),
        "--out",
        str(out),
        "--min_frames",
        "4",
        "--workers",
        "1",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 x clip is too short, such as train/fire/short (1 frames, expected 4)" in said
    assert "such as train/fire/broken (2.jpg" in said
    data = VideoDataModule(out, 1, frames=4, size=8, channels=1, mean=0, std=1, targets="text")
    batch = next(iter(data.val_dataloader()))
    assert data.decode_targets(batch["targets"][0]) == "waves"
    for place, f in enumerate((1, 2, 9, 10)):
        frame = np.asarray(Image.open(source / "validation" / "waves" / "c0" / f"f{f}.png"))
        np.testing.assert_array_equal((batch["inputs"]["pixel_values"][0, place, 0] * 255).round(), frame)


@pytest.mark.parametrize(
    ("modality", "contents", "expected"),
    [
        ("image", {}, "found no pictures"),
        ("image", {"a.png": b"x"}, "have no texts"),
        ("text", {"a.doc": b"x"}, "found no texts"),
        ("text", {"a.txt": b"x"}, "none of 1 files can be used"),
        ("video", {"a.txt": b"x"}, "found no clips"),
    ],
)
def test_mistakes_are_one_line(
    modality: str,
    contents: dict[str, bytes],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    command = ["prepare", modality, "--out", str(tmp_path / "out"), "--workers", "1", "--source"]
    assert main([*command, str(tmp_path / "in")]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "there is no source" in capsys.readouterr().err


def test_a_journal_that_was_cut_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(8):
        save(source / "owl" / f"{i}.png")
    command = [
        "prepare",
        "image",
        "--source",
        str(source),
        "--out",
        str(out),
        "--workers",
        "1",
        "--shard_size",
        "3",
    ]
    assert main(command) == 0
    shards = {p: p.read_bytes() for p in sorted(out.rglob("*.tar"))}
    journal = out / "checked.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    (out / "train" / "index.json").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert " of 8 files were checked by an earlier run" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in sorted(out.rglob("*.tar"))} == shards
    assert len(journal.read_bytes().splitlines()) == 9


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path: Path) -> None:
    """SIGKILL at several moments, then once more to the end: the same bytes as in one go, and no half shard."""
    source = tmp_path / "in"
    for i in range(300):
        save(source / f"c{i % 3}" / f"{i}.png", (160, 120))

    def command(out: Path) -> list[str]:
        options = ["--workers", "2", "--shard_size", "10", "--val_share", "0", "--test_share", "0"]
        return [
            sys.executable,
            "-m",
            "datamodules",
            "prepare",
            "image",
            "--source",
            str(source),
            "--out",
            str(out),
            *options,
        ]

    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    for pause in (1.5, 3.0, 4.5, 6.0):
        process = subprocess.Popen(
            command(out),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(pause)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in out.rglob("*.tar"):
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(out)).read_bytes()
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)
    left = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.tar")}
    assert left == {
        p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.tar")
    }
    assert not list(out.rglob("*.tmp*"))
