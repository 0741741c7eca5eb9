"""Lightning's Rich progress bar with the figures that one looks at while a training runs."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from qm_lightning.callbacks.loop_state import logs_now

# Logged name -> name in the bar, which has little room.
_SHOWN = {"train/loss/total": "loss", "train/tokens/compression": "merged", "val/quality/nats": "val nats"}


class TrainingBar(RichProgressBar):
    """Shows loss, compression and the newest validation, instead of the last letters of the run's id.

    The figures are those of the last logged step: between these no step waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, int | str | float | dict[str, float]] = {}

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Short names and values."""
        if not trainer.training or logs_now(trainer):
            logged = trainer.callback_metrics
            self._figures |= {short: float(logged[name]) for name, short in _SHOWN.items() if name in logged}
        return dict(self._figures)

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning would write ``Epoch 0/-2`` where the number of epochs is open."""
        text: str = super()._get_train_description(current_epoch)
        # As wide as the other description, or the bars would jump.
        return f"{text.replace('/-2', ''):{len(self.validation_description)}}"
