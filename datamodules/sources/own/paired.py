"""`python -m datamodules prepare paired --source FOLDER`: pictures with captions, the same as for `image`."""

from __future__ import annotations

from datamodules.sources.own.image import add_arguments, prepare

__all__ = ["add_arguments", "prepare"]
