"""Pixels as a backbone was trained on them: resized, cropped and normalised as its own configuration says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.errors import DataError


@dataclass(frozen=True)
class PixelTransform:
    """From a decoded picture to what the backbone takes.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: (height, width), or the shortest edge in pixels, or ``None``: as it is.
        crop: (height, width) of the centre that is kept, padded with zeros if it is smaller; ``None``: all.
        rescale: factor on the 8-bit values.
        mean: per channel, taken off after rescaling.
        std: per channel, what the rest is divided by.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
    """

    channels: int
    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None = None
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resample: int = Image.Resampling.BILINEAR

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"channels is {self.channels}, expected 1 (grey) or 3 (RGB)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise DataError(
                    f"{name} has {len(values)} values, expected 1 or {self.channels} (the channels)"
                )
        if 0.0 in self.std:
            raise DataError("std holds a 0, expected the standard deviation of each channel")

    def pixels(self, picture: NDArray[np.uint8]) -> Tensor:
        """Resize and crop one picture.

        Args:
            picture: uint8 [h,w,3].

        Returns:
            uint8 [C,H,W]: 8-bit, so that little is moved between processes; `normalise` does the rest.
        """
        image = Image.fromarray(picture)
        if self.channels == 1:
            image = image.convert("L")
        target = self._target(image.height, image.width)
        if target != (image.height, image.width):
            image = image.resize((target[1], target[0]), Image.Resampling(self.resample))
        values = torch.from_numpy(np.array(image))
        values = values[None] if self.channels == 1 else values.permute(2, 0, 1)
        return values.contiguous() if self.crop is None else _centre(values, *self.crop)

    def frames(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Resize and crop the frames of a clip; uint8 [F,h,w,3] -> uint8 [F,C,H,W], as `pixels` does each."""
        count, height, width, _ = pictures.shape
        if self.crop is not None or self._target(height, width) != (height, width):
            return torch.stack([self.pixels(picture) for picture in pictures])
        if self.channels == 3:
            return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        # One tall picture: a call of Pillow costs more than the pixels of a small frame.
        grey = Image.fromarray(pictures.reshape(count * height, width, 3)).convert("L")
        return torch.from_numpy(np.array(grey)).view(count, 1, height, width)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale 8-bit pixels to what the backbone takes; uint8 [...,C,H,W] -> float32 [...,C,H,W]."""
        mean, std = self._per_channel()
        return pixels.float().mul_(self.rescale).sub_(mean).div_(std)

    def picture(self, values: Tensor) -> NDArray[np.float32]:
        """Undo `normalise` for one picture: float [C,H,W] -> [H,W] or [H,W,3] in [0,1]."""
        mean, std = self._per_channel()
        levels = (values.float().cpu() * std + mean) / (self.rescale * 255)
        shown: NDArray[np.float32] = levels.clamp(0, 1).permute(1, 2, 0).numpy()
        return shown[..., 0] if self.channels == 1 else shown

    def _per_channel(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return mean, std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        long = int(self.size * max(height, width) / min(height, width))
        return (self.size, long) if height <= width else (long, self.size)


def _centre(values: Tensor, height: int, width: int) -> Tensor:
    """Centre of [C,h,w], with zeros around it where the picture is smaller, rounded as transformers does."""
    h, w = values.shape[-2:]
    if height > h or width > w:
        tall, wide = max(height, h), max(width, w)
        top, left = -(-(tall - h) // 2), -(-(wide - w) // 2)
        values = torch.nn.functional.pad(values, (left, wide - w - left, top, tall - h - top))
        h, w = tall, wide
    top, left = (h - height) // 2, (w - width) // 2
    return values[..., top : top + height, left : left + width].contiguous()
