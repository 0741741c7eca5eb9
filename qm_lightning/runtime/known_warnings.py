"""Warnings of libraries that mean nothing here; each is left out for a reason, all others are shown."""

from __future__ import annotations

import warnings

_FALSE_ALARMS = (
    # The frozen backbone is meant to be in evaluation mode.
    r"Found \d+ module\(s\) in eval mode",
    # Validation figures are torchmetrics' results, which are already those of all ranks.
    r"It is recommended to use `self\.log\(.*sync_dist=True",
    # torch 2.13 renames it; torch 2.11 does not know the new name.
    r"`broadcast_buffers` is deprecated",
    # lightning 2.6 on torch 2.13
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def silence_false_alarms() -> None:
    """Leave them out in this process."""
    for message in _FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=message)
