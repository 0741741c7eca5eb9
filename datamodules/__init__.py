"""DataModules that stream WebDataset shards, exactly and elastically. They work with any LightningModule."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.image import ImageDataModule
    from datamodules.mixture import MixtureDataModule
    from datamodules.paired import PairedDataModule
    from datamodules.text import TextDataModule
    from datamodules.video import VideoDataModule

__all__ = ["ImageDataModule", "MixtureDataModule", "PairedDataModule", "TextDataModule", "VideoDataModule"]

_MODULES = {
    "ImageDataModule": "image",
    "MixtureDataModule": "mixture",
    "PairedDataModule": "paired",
    "TextDataModule": "text",
    "VideoDataModule": "video",
}


def __getattr__(name: str) -> Any:
    """Import a DataModule when it is asked for: `python -m datamodules` needs neither torch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
