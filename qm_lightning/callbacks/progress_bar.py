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

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, or up to ``max_steps``; Lightning forgets those before a resume (``18/14``)."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_steps < 0:
            return batches
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done >= batches:  # of the epoch before
            done = 0
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(batches, done + left)

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning would write ``Epoch 0/-2`` where the number of epochs is open."""
        text: str = super()._get_train_description(current_epoch)
        # As wide as the other description, or the bars would jump.
        return f"{text.replace('/-2', ''):{len(self.validation_description)}}"
