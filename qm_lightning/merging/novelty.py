"""What is new in a clip: a token that repeats what lay at its place a step before matters less (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.merging.grouping import unit_metric
from qm_lightning.tokens import Tokens

TIME_COORDINATES = 3  # positions of a clip: step, row, column
_BITS = 20  # of one coordinate in a key: grids of up to a million


@torch.no_grad()
def repetition(tokens: Tokens) -> Tensor:
    """Likeness of each token to the one at the same place, one step before.

    Tokens may come in any order and be incomplete; nothing is read back from the device.

    Args:
        tokens: with positions (step, row, column) and a ``metric``, or else by their values.

    Returns:
        [B,N] float in [0,1]: the cosine, 0 where it is negative or there is no such token; 0 for protected tokens,
        which stand for whole pictures, and for everything that is not a clip.
    """
    unit = unit_metric(tokens)
    if tokens.positions.shape[-1] != TIME_COORDINATES:
        return unit.new_zeros(tokens.mask.shape)
    time, row, column = tokens.positions.unbind(-1)
    place = (row << _BITS) + column
    usable = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
    nowhere = -torch.ones_like(place)  # sorts before every key and equals none
    key = torch.where(usable, (time << 2 * _BITS) + place, nowhere)
    wanted = torch.where(usable & (time > 0), ((time - 1) << 2 * _BITS) + place, nowhere - 1)
    ordered, order = key.sort(dim=1)
    slot = torch.searchsorted(ordered, wanted).clamp(max=key.shape[1] - 1)
    found = ordered.gather(1, slot) == wanted
    before = unit.gather(1, order.gather(1, slot).unsqueeze(-1).expand_as(unit))
    return ((unit * before).sum(-1).clamp(0.0, 1.0)).masked_fill(~found, 0.0)
