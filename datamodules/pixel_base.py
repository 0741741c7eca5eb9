"""What all DataModules of pictures and clips share: pixels and targets put side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import ShardDataModule
from datamodules.processing.pixels import PixelTransform
from datamodules.processing.targets import TargetVocabulary, pad_targets
from datamodules.shards.stream import Batch


class PixelDataModule(ShardDataModule):
    """Subclasses set `pixels`, `_vocabulary` and `_target_length`, and decode to `pixels` and `targets`."""

    pixels: PixelTransform
    _vocabulary: TargetVocabulary
    _target_length: int

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """`inputs.pixel_values` float [B,...,C,H,W], `targets` long [B,T]; `patch_labels` long [B,N] if any."""
        pixels = torch.stack([s["pixels"] for s in samples])
        batch: Batch = {
            "inputs": {"pixel_values": self.pixels.normalise(pixels)},
            "targets": pad_targets([s["targets"] for s in samples], self._target_length),
        }
        if all("patch_labels" in s for s in samples):
            batch["patch_labels"] = torch.stack([s["patch_labels"] for s in samples])
        return batch

    def decode_targets(self, ids: Tensor) -> str:
        """Target ids, long [T], as text."""
        return self._vocabulary.decode(ids)

    def describe_input(self, batch: Batch, i: int) -> Any:
        """Picture i as [H,W] or [H,W,3] float32 in [0,1]."""
        return self.pixels.picture(batch["inputs"]["pixel_values"][i])
