"""Video files as cameras and the web have them: from a folder to the windows of a batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import VideoDataModule
from datamodules.__main__ import main

av = pytest.importorskip("av")
FRAMES, STEP, HEIGHT, WIDTH = 24, 10, 64, 96


def film(path: Path, container: str, codec: str, frames: int = FRAMES, **options: str) -> None:
    """Write a clip whose frame i is all grey of level STEP * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            picture = np.full((HEIGHT, WIDTH, 3), STEP * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    film(root / "grey/camera.MP4", "mp4", "libx264", bf="3", g="12")  # frames are stored out of order
    film(root / "grey/web.webm", "webm", "libvpx-vp9")
    film(root / "dark/old.avi", "avi", "mpeg4")
    film(root / "dark/phone.mov", "mov", "mpeg4")
    film(root / "dark/short.mkv", "matroska", "libx264", frames=3)
    whole = (root / "grey/camera.MP4").read_bytes()
    (root / "grey/cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "grey/none.mp4").write_bytes(b"")
    (root / "grey/page.mp4").write_bytes(b"<html>not found</html>")
    for i in range(12):
        (root / "dark/pictures").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (STEP * i,) * 3).save(root / f"dark/pictures/{i}.jpg")
    return root


def test_from_a_folder_to_windows(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["prepare", "video", "--source", str(source), "--out", str(out), "--min_frames", "8"]
    assert main([*command, "--workers", "1", "--val_share", "0", "--test_share", "0"]) == 0
    assert "5 samples found, 4 files or records skipped" in capsys.readouterr().out
    skipped = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert {row["name"]: row["reason"] for row in skipped} == {
        "dark/short.mkv": "clip is too short",
        "grey/cut.mp4": "damaged",
        "grey/none.mp4": "file is empty",
        "grey/page.mp4": "damaged",
    }
    data = VideoDataModule(out, 5, size=(32, 48), mean=0.0, std=1.0, frames=4, stride=2, targets="text")
    data.predict_split = "train"
    batch = next(iter(data.predict_dataloader()))
    found = dict(zip(batch["keys"], batch["inputs"]["pixel_values"], strict=True))
    assert {key: data.decode_targets(t) for key, t in zip(batch["keys"], batch["targets"], strict=True)} == {
        "grey/camera": "grey", "grey/web": "grey", "dark/old": "dark", "dark/phone": "dark",
        "dark/pictures": "dark",
    }  # fmt: skip
    for key, pixels in found.items():
        assert pixels.shape == (4, 3, 32, 48)
        first = 3 if key == "dark/pictures" else 9  # the middle window of 7 frames in 12, or in 24
        levels = pixels.mean(dim=(1, 2, 3)) * 255 / STEP
        np.testing.assert_allclose(levels, [first, first + 2, first + 4, first + 6], atol=0.5)
