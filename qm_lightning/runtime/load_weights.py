"""Whether a checkpoint fits the configured model, found before anything of its run is touched."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import read_checkpoint

_SHOWN = 2


def load_weights(module: LightningModule, path: str) -> None:
    """Load the weights of a checkpoint, strictly, through the module's own hook for its frozen part.

    Args:
        module: not yet wrapped or sharded by a strategy.
        path: the checkpoint.

    Raises:
        UserError: another backbone, or other parameters than the module has.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        differing = _differences(checkpoint["state_dict"], module.state_dict()) or [str(error)]
        rest = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{path} does not fit the configured model ({', '.join(differing[:_SHOWN])}{rest}); expected the model "
            "that it was trained with; leave out the options that changed it, or train anew in another --run_dir"
        ) from error


def _differences(saved: dict[str, Any], live: dict[str, Any]) -> list[str]:
    return [
        *(
            f"{name} is {list(saved[name].shape)} there and {list(live[name].shape)} here"
            for name in saved
            if name in live and saved[name].shape != live[name].shape
        ),
        *(f"{name} is only there" for name in sorted(saved.keys() - live.keys())),
        *(f"{name} is only here" for name in sorted(live.keys() - saved.keys())),
    ]
