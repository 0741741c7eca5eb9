"""The fidelity constraint: merging must keep a share of the tokens' norm."""

from __future__ import annotations

from torch import Tensor

from qm_lightning.losses.reduce import LossSum
from qm_lightning.tokens import MergedTokens, Tokens


def relative_error(tokens: Tokens, merged: MergedTokens) -> Tensor:
    """``||X - unmerge||^2 / ||X||^2`` over the valid tokens of each sample.

    Args:
        tokens: what was merged, [B,N,D].
        merged: what came of it.

    Returns:
        [B] float, 0 = nothing lost; in fp32 at least.
    """
    keep = tokens.mask.unsqueeze(-1)
    values = tokens.values if tokens.values.dtype.itemsize >= 4 else tokens.values.float()
    values = values.masked_fill(~keep, 0.0)
    lost = (values - merged.unmerge()).masked_fill(~keep, 0.0)
    tiny = values.new_tensor(1e-12)
    return lost.square().sum(dim=(1, 2)) / values.square().sum(dim=(1, 2)).maximum(tiny)


def fidelity_loss(tokens: Tokens, merged: MergedTokens, gamma: float, valid: Tensor) -> LossSum:
    """``relu(relative error - (1 - gamma)^2)`` (quickmerge.md, section 5).

    Args:
        tokens: what was merged.
        merged: what came of it.
        gamma: share of the norm that must survive; the loss is idle above it.
        valid: [B] bool, False = padding sample.

    Returns:
        Sum over valid samples, and their number.
    """
    excess = (relative_error(tokens, merged) - (1.0 - gamma) ** 2).relu()
    return (excess.masked_fill(~valid, 0.0).sum(), valid.sum())
