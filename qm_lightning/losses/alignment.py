"""Alignment of merged tokens with their neighbours: what comes next, and what came before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from qm_lightning.losses.reduce import LossSum
from qm_lightning.tokens import MergedTokens

if TYPE_CHECKING:
    from qm_lightning.priors import PriorOutput


def alignment_losses(output: PriorOutput, merged: MergedTokens, valid: Tensor) -> tuple[LossSum, LossSum]:
    """Smooth-L1 between each prediction and the neighbour's normalised value (quickmerge.md, section 5).

    What is predicted is layer-normalised without parameters, and its gradient is stopped: else constant
    merged tokens would be the easiest to predict.

    Args:
        output: of the prior, with both predictions [B,K,D]; without them both losses are zero.
        merged: K merged tokens of width D.
        valid: [B] bool, False = padding sample.

    Returns:
        Forward and backward loss: sums over pairs of neighbours (mean over D), and the number of pairs.
    """
    zero = merged.values.new_zeros(())
    if output.forward_prediction is None or output.backward_prediction is None:
        return (zero, zero), (zero, zero)
    values = merged.values.detach()
    values = values if values.dtype.itemsize >= 4 else values.float()
    target = F.layer_norm(values, values.shape[-1:])
    pairs = merged.mask[:, 1:] & merged.mask[:, :-1] & valid[:, None]
    return (
        _pair_loss(output.forward_prediction[:, :-1], target[:, 1:], pairs),
        _pair_loss(output.backward_prediction[:, 1:], target[:, :-1], pairs),
    )


def _pair_loss(prediction: Tensor, target: Tensor, pairs: Tensor) -> LossSum:
    distance = F.smooth_l1_loss(prediction.to(target.dtype), target, reduction="none").mean(dim=-1)
    return (distance.masked_fill(~pairs, 0.0).sum(), pairs.sum())
