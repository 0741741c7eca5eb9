"""How many tokens each sample keeps (spec quickmerge.md, section 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from qm_lightning.described import Described
from qm_lightning.errors import UserError


class Budget(Described, nn.Module, ABC):
    """Salience -> number of tokens kept.

    Attributes:
        reads_salience: whether the number depends on the salience at all.
    """

    reads_salience: ClassVar[bool] = True

    @abstractmethod
    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """Tokens to keep.

        Args:
            salience: [B,N] float.
            mask: [B,N] bool.

        Returns:
            [B] long, between 1 and the valid tokens of the sample.
        """

    def bound(self, tokens: int) -> int:
        """Largest number that up to ``tokens`` valid tokens can give, without looking at data."""
        return tokens

    def steepest(self, tokens: int) -> float:
        """Largest N_valid / K of any sample of up to ``tokens`` valid tokens, without looking at data."""
        return float(tokens)


def checked_compression(compression: float) -> float:
    """The compression as a float.

    Raises:
        UserError: it is below 1, or no number.
    """
    if not compression >= 1.0:
        raise UserError(
            f"compression={compression}: expected at least 1 (valid tokens in per token out); "
            "2.37 is the paper's"
        )
    return float(compression)


class FixedBudget(Budget):
    """``K = round(N_valid / compression)``.

    Args:
        compression: valid tokens in per token out, at least 1.
    """

    reads_salience: ClassVar[bool] = False

    def __init__(self, compression: float = 2.37) -> None:
        super().__init__()
        self.compression = checked_compression(compression)

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """[B] long."""
        return (mask.sum(1).double() / self.compression).round().long().clamp(min=1)

    def bound(self, tokens: int) -> int:
        """Rounded share of ``tokens``."""
        return max(1, round(tokens / self.compression))

    def steepest(self, tokens: int) -> float:
        """Rounding down costs up to half a token, which weighs most where one is left."""
        return min(float(tokens), 1.5 * self.compression)


class MassBudget(Budget):
    """The smallest K whose top-K salience holds the share ``gamma`` of the whole.

    Args:
        gamma: share in (0,1].
    """

    def __init__(self, gamma: float = 0.8) -> None:
        super().__init__()
        if not 0.0 < gamma <= 1.0:
            raise UserError(f"gamma={gamma}: expected a share in (0, 1]")
        self.gamma = gamma

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """[B] long."""
        mass = salience.detach().double().clamp(min=0).masked_fill(~mask, 0.0).sort(1, descending=True).values
        total = mass.sum(1, keepdim=True)
        short = (mass.cumsum(1) < self.gamma * total * (1 - 1e-6)).sum(1)
        return (short + 1).clamp(min=1).minimum(mask.sum(1))
