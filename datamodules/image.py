"""Pictures from shards: digit scenes, or anyone's own pictures with names or captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from datamodules.pixel_base import PixelDataModule
from datamodules.processing.fields import PATCHES_FIELD, read_picture
from datamodules.processing.labels import LabelReader, TargetKind
from datamodules.processing.pixel_config import pixel_transform
from datamodules.shards.decode import decode_field


class ImageDataModule(PixelDataModule):
    """Pictures and their target sequences, with the pixels that the backbone was trained on.

    Samples hold a `png`, `jpg` or `jpeg`, and `digits.json` (a list of digits) or `txt` (a class name or a
    caption); `patches.npy` (uint8, a class per patch) if a backbone shall be pre-trained on them.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`.
        batch_size: samples of a batch on each rank.
        processor: folder or hub name of the backbone: its `preprocessor_config.json` prepares the pixels.
        size: without a processor: (height, width) in pixels, one number for a square.
        mean: without a processor: what is taken off the pixels in [0,1], one number for all channels.
        std: without a processor: what the pixels are then divided by.
        channels: without a processor: 1 (grey) or 3 (RGB).
        targets: `digits` (11 ids), `digit_text` (digits as bytes) or `text` (bytes of `txt`; both 257 ids); or a
            label set: `digit_labels`, `word_labels`, `text_labels` (see `LabelReader`).
        target_length: longest target, end token included; the rest is cut off, of label sets whole labels.
        download: fetch a processor by its name, over the network.
        **stream: options of `ShardDataModule`.

    Raises:
        DataError: neither or both of processor and size, or the processor cannot be read.
    """

    modality: ClassVar[str] = "image"

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
        targets: TargetKind = "digits",
        target_length: int = 64,
        download: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(root, batch_size, **stream)
        self.pixels = pixel_transform(processor, size, mean, std, channels, download)
        self._labels, self._target_length = LabelReader(targets, target_length), target_length
        self.label_sets = self._labels.is_set
        self._vocabulary = self._labels.vocabulary
        self.vocab_size, self.eos_id = self._vocabulary.vocab_size, self._vocabulary.eos_id

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """One picture: `pixels` uint8 [C,H,W], `targets` long [T], `patch_labels` long [N] where stored."""
        pixels = self.pixels.pixels(read_picture(fields))
        sample: dict[str, Any] = {"pixels": pixels, "targets": self._labels.read(fields, seed)}
        if PATCHES_FIELD in fields:
            labels = np.asarray(decode_field(PATCHES_FIELD, fields[PATCHES_FIELD]), dtype=np.int64)
            sample["patch_labels"] = torch.from_numpy(labels.reshape(-1))
        return sample
