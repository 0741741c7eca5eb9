"""Losses: each is a sum and a count, made a mean over all ranks by ``global_mean``."""

from qm_lightning.losses.alignment import alignment_losses
from qm_lightning.losses.collapse import collapse_variance
from qm_lightning.losses.fidelity import fidelity_loss, relative_error
from qm_lightning.losses.reduce import LossSum, global_mean
from qm_lightning.losses.target import target_loss

__all__ = [
    "LossSum",
    "alignment_losses",
    "collapse_variance",
    "fidelity_loss",
    "global_mean",
    "relative_error",
    "target_loss",
]
