"""Every kind of bad sample, through the loader: named and counted under `skip`, refused under `raise`, never silent."""

from __future__ import annotations

import gzip
import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_decode import png_header

from datamodules import ImageDataModule, PairedDataModule, TextDataModule, VideoDataModule
from datamodules.base import ShardDataModule
from datamodules.errors import DataError
from datamodules.shards import decode
from datamodules.shards.writer import write_shards
from datamodules.sources.encoding import json_bytes, npy_bytes, png_bytes

Sample = dict[str, bytes]


def image(root: Path, **options: Any) -> ShardDataModule:
    return ImageDataModule(root, 4, size=8, **options)


def text(root: Path, **options: Any) -> ShardDataModule:
    return TextDataModule(root, 4, **options)


def paired(root: Path, **options: Any) -> ShardDataModule:
    return PairedDataModule(root, 4, size=8, **options)


def video(root: Path, **options: Any) -> ShardDataModule:
    return VideoDataModule(root, 4, frames=4, size=8, **options)


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    return out.getvalue()


PICTURE: Sample = {"png": png_bytes(np.zeros((8, 8), np.uint8)), "digits.json": b"[1]"}
PAIR: Sample = {"png": PICTURE["png"], "txt": b"a 3 above a 7"}
TEXT: Sample = {"txt": b"good", "target.txt": b"fine"}
CLIP: Sample = {"frames.npy": npy_bytes(np.zeros((4, 8, 8), np.uint8)), "digits.json": b"[1]"}

CASES: dict[str, tuple[Callable[..., ShardDataModule], Sample, Sample, str]] = {
    "truncated picture": (image, PICTURE, {"png": PICTURE["png"][:40]}, "damaged"),
    "truncated jpeg": (image, PICTURE, {"png": jpeg()[:-200]}, "damaged"),
    "animated picture": (image, PICTURE, {"png": animated()}, "animated, 2 frames"),
    "pixel bomb": (image, PICTURE, {"png": png_header(60_000, 60_000)}, "pixels"),
    "packed bomb": (image, PICTURE, {"png.gz": gzip.compress(bytes(2 << 20), 9), "png": b""}, "unpacks to more"),
    "no picture": (image, PICTURE, {"png": b"<html>"}, "damaged"),
    "bad labels": (image, PICTURE, {"digits.json": json_bytes(["x"])}, "digits 0 to 9"),
    "labels are no list": (image, PICTURE, {"digits.json": b"5"}, "digits 0 to 9"),
    "labels are booleans": (image, PICTURE, {"digits.json": b"[true]"}, "digits 0 to 9"),
    "empty caption": (paired, PAIR, {"txt": b""}, "the caption 'txt' is empty"),
    "blank caption": (paired, PAIR, {"txt": b" \n"}, "the caption 'txt' is empty"),
    "empty text": (text, TEXT, {"txt": b""}, "text is empty"),
    "empty target": (text, TEXT, {"target.txt": b""}, "text is empty"),
    "text is not UTF-8": (text, TEXT, {"txt": b"\xff\xfe"}, "not UTF-8"),
    "target is not UTF-8": (text, TEXT, {"target.txt": b"Gr\xfc\xdfe"}, "not UTF-8"),
    "short clip": (video, CLIP, {"frames.npy": npy_bytes(np.zeros((3, 8, 8), np.uint8))}, "the clip has 3 frames"),
    "clip without pixels": (video, CLIP, {"frames.npy": npy_bytes(np.zeros((4, 0, 8), np.uint8))}, "one pixel"),
    "pickled clip": (
        video,
        CLIP,
        {"frames.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128)},
        "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_sample(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "Limits", partial(decode.Limits, bytes=1 << 20))  # a small bomb bursts sooner
    make, good, change, message = CASES[case]
    if case == "packed bomb":
        good = {**good, "png.gz": gzip.compress(good["png"])}
        good = {k: v for k, v in good.items() if k != "png"}
        change = {"png.gz": change["png.gz"]}
    samples: list[Sample] = [{"__key__": f"{i}".encode(), **good} for i in range(6)]
    samples[3] = {**samples[3], **change}
    for split in ("train", "test"):
        write_shards(tmp_path, split, samples, progress=False)

    def kept(loader: Any) -> list[str]:
        return [k for batch in loader for k, real in zip(batch["keys"], batch["valid"], strict=True) if real]

    budget = {"max_bad": 1, "max_bad_share": 1.0, "shuffle": False}
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        assert kept(make(tmp_path, **budget).train_dataloader()) == ["0", "1", "2", "4", "5"]
    said = [r.getMessage() for r in caplog.records]
    assert any("sample 3 of train-000000" in line and "key '3'" in line and message in line for line in said)
    assert "1 of 6 samples of this epoch were bad and skipped; allowed are 1" in said

    for loader in (  # training within 1 % of 6 samples, training that forbids it, evaluation
        make(tmp_path, shuffle=False).train_dataloader(),
        make(tmp_path, on_error="raise", shuffle=False).train_dataloader(),
        make(tmp_path).test_dataloader(),
    ):
        with pytest.raises(DataError, match=message) as caught:
            kept(loader)
        assert "key '3'" in str(caught.value)
    assert len(kept(make(tmp_path, on_error_eval="skip", **budget).test_dataloader())) == 5
