"""Rotary position embedding on three axes (frame, row, column), one way for every modality.

Frequency ``i`` is rotated by axis ``i mod 3`` (interleaved, as in M-RoPE), so each axis gets low and high
frequencies alike. Text has one coordinate, put on all three axes: there it is plain RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = 3


def to_three_axes(positions: Tensor) -> Tensor:
    """Bring coordinates of any modality to (frame, row, column).

    Args:
        positions: [B,K,P] long, P = 1 (text), 2 (image: row, column) or 3 (video).

    Returns:
        [B,K,3] long. Text: its index three times; image: frame 0.

    Raises:
        ValueError: P is none of 1, 2, 3.
    """
    coordinates = positions.shape[-1]
    if coordinates == 1:
        return positions.expand(-1, -1, AXES)
    if coordinates == 2:
        return torch.nn.functional.pad(positions, (1, 0))
    if coordinates == AXES:
        return positions
    raise ValueError(f"positions have {coordinates} coordinates; expected 1 (text), 2 (image) or 3 (video)")


def rotary_tables(positions: Tensor, pairs: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token's rotation angles.

    Args:
        positions: [B,S,3] long.
        pairs: channel pairs of a head that are rotated.
        base: longest wavelength over 2 pi; frequency i is ``base ** (-i / pairs)``.
        dtype: of the model; angles are computed in fp32 at least, because bf16 cannot hold a position.

    Returns:
        Two tensors [B,1,S,pairs], the 1 for the heads.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    index = torch.arange(pairs, device=positions.device)
    frequencies = base ** (-index.to(precise) / pairs)
    angles = positions[..., index % AXES].to(precise) * frequencies
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, tail: Tensor) -> Tensor:
    """Rotate channel i with channel i + pairs, and append further channels in the same copy.

    Args:
        x: [B,heads,S,2 pairs].
        cos: [B,1,S,pairs].
        sin: [B,1,S,pairs].
        tail: broadcastable to [B,heads,S,extra], appended as it is, in the dtype of the result.

    Returns:
        [B,heads,S,2 pairs + extra] in the dtype of ``tail``.
    """
    first, second = x.chunk(2, dim=-1)
    tail = tail.expand(*x.shape[:-1], tail.shape[-1])
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([part.to(tail.dtype) for part in turned] + [tail], dim=-1)
