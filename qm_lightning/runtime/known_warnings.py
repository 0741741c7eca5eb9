"""What libraries say that means nothing here; each is left out for a reason, all else is shown."""

from __future__ import annotations

import logging
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
    # A resume; a start from zero in a directory with a past is refused before Lightning looks.
    r"Checkpoint directory .* exists and is not empty",
    # `test` and `predict` read a checkpoint and need none of the training's callbacks.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
)

# Lightning recommends other products of its makers, and says where its own summary would have been.
_ADVICE = ("Tip:", "Trainer already configured with model summary callbacks")


def silence_false_alarms() -> None:
    """Leave them out in this process."""
    for message in _FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=message)
    # The same function a second time is not added again.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_this_run)


def _is_about_this_run(record: logging.LogRecord) -> bool:
    return not any(advice in record.getMessage() for advice in _ADVICE)
