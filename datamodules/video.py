"""Clips from shards: moving digits, or anyone's own clips as frames, arrays or video files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.pixel_base import PixelDataModule
from datamodules.processing.clips import open_clip
from datamodules.processing.fields import PATCHES_FIELD
from datamodules.processing.labels import LabelReader, TargetKind
from datamodules.processing.pixel_config import pixel_transform
from datamodules.processing.pretrained import read_model_json
from datamodules.shards.decode import decode_field
from datamodules.shards.stream import Batch, Decode
from datamodules.sources.scenes import BACKGROUND

FRAMES = 8  # of a window, where neither the data nor the backbone says


class VideoDataModule(PixelDataModule):
    """Windows of clips and their target sequences, with the pixels that the backbone was trained on.

    Samples hold a clip (see `datamodules.processing.clips`) and `digits.json` or `txt`; `patches.npy` (uint8 [F,N],
    a class per patch and frame) if a backbone shall be pre-trained on them. Training draws where a window starts;
    evaluation takes the middle of the clip.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`.
        batch_size: samples of a batch on each rank.
        processor: folder or hub name of the backbone: its configuration prepares pixels and frames.
        size: without a processor: (height, width) in pixels, one number for a square.
        mean: without a processor: what is taken off the pixels in [0,1], one number for all channels.
        std: without a processor: what the pixels are then divided by.
        channels: without a processor: 1 (grey) or 3 (RGB).
        frames: frames of a window; `None`: as many as the backbone reads, or 8 (an image backbone reads one by one).
        stride: a window takes every `stride`-th frame.
        tubelet: frames that the backbone reads as one step, for patch labels; `None`: as its configuration says.
        targets: `digits` (11 ids), `digit_text` (digits as bytes) or `text` (bytes of `txt`; both 257 ids).
        target_length: longest target, end token included; the rest is cut off.
        download: fetch a processor by its name, over the network.
        **stream: options of `ShardDataModule`.

    Raises:
        DataError: neither or both of processor and size, or a count below 1.
    """

    modality: ClassVar[str] = "video"

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        *,
        processor: str | None = None,
        size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        channels: int = 3,
        frames: int | None = None,
        stride: int = 1,
        tubelet: int | None = None,
        targets: TargetKind = "digits",
        target_length: int = 64,
        download: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(root, batch_size, **stream)
        self.pixels = pixel_transform(processor, size, mean, std, channels, download)
        model = (read_model_json(processor, "config.json", download) or {}) if processor else {}
        self.frames = int(model.get("num_frames", FRAMES)) if frames is None else frames
        self.tubelet = _tubelet(model) if tubelet is None else tubelet
        self.stride = stride
        if min(self.frames, self.stride, self.tubelet) < 1 or self.frames % self.tubelet:
            raise DataError(
                f"frames is {self.frames}, stride {self.stride} and tubelet {self.tubelet}; expected 1 or more each, "
                "and frames a multiple of tubelet"
            )
        self._labels, self._target_length = LabelReader(targets, target_length), target_length
        self.label_sets = self._labels.is_set
        self._vocabulary = self._labels.vocabulary
        self.vocab_size, self.eos_id = self._vocabulary.vocab_size, self._vocabulary.eos_id

    def decoder(self, training: bool) -> Decode:
        """A window anywhere in training, in the middle otherwise."""
        return self.decode if training else self.decode_middle

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """A window that starts anywhere: `pixels` uint8 [F,C,H,W], `targets` long [T], `patch_labels` long [N]."""
        return self._decode(fields, Random(seed).random(), seed)

    def decode_middle(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """The window in the middle of the clip; the same keys as `decode`."""
        return self._decode(fields, 0.5, seed)

    def _decode(self, fields: dict[str, bytes], place: float, seed: int) -> dict[str, Any]:
        clip = open_clip(fields)
        chosen = self._window(len(clip), place)
        pixels = self.pixels.frames(clip.read(chosen))
        sample: dict[str, Any] = {"pixels": pixels, "targets": self._labels.read(fields, seed)}
        if PATCHES_FIELD in fields:
            labels = np.asarray(decode_field(PATCHES_FIELD, fields[PATCHES_FIELD]), dtype=np.int64)
            sample["patch_labels"] = torch.from_numpy(join_labels(labels[chosen], self.tubelet))
        return sample

    def _window(self, total: int, place: float) -> list[int]:
        """Frames of the window whose start lies at `place` in [0,1) of where it can lie."""
        spare = total - ((self.frames - 1) * self.stride + 1)
        if spare < 0:
            raise DataError(
                f"the clip has {total} frames, a window of {self.frames} with stride {self.stride} needs "
                f"{total - spare}; leave short clips out with on_error=skip, or set fewer frames or a smaller stride"
            )
        start = int(place * (spare + 1))
        return list(range(start, start + self.frames * self.stride, self.stride))

    def describe_input(self, batch: Batch, i: int) -> NDArray[np.float32]:
        """Window i as [F,H,W] or [F,H,W,3] float32 in [0,1]."""
        return np.stack([self.pixels.picture(frame) for frame in batch["inputs"]["pixel_values"][i]])


def join_labels(labels: NDArray[np.int64], tubelet: int) -> NDArray[np.int64]:
    """One label per tubelet: the first of its frames' labels that is not the background.

    Args:
        labels: [F,N] int64, a class per frame and patch.
        tubelet: frames of a tubelet.

    Returns:
        [F / tubelet * N] int64, tubelet by tubelet in raster order.
    """
    steps = labels.reshape(-1, tubelet, labels.shape[-1])
    first = (steps != BACKGROUND).argmax(axis=1)
    joined: NDArray[np.int64] = np.take_along_axis(steps, first[:, None], axis=1).reshape(-1)
    return joined


def _tubelet(model: dict[str, Any]) -> int:
    """Frames of a tubelet by a backbone's configuration; ViViT lists (frames, rows, columns)."""
    size = model.get("tubelet_size", 1)
    return int(size if isinstance(size, int) else size[0])
