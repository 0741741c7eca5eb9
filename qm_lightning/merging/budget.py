"""How many tokens each sample keeps (spec quickmerge.md, section 3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError


class Budget(nn.Module, ABC):
    """Salience -> number of tokens kept."""

    @abstractmethod
    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """Tokens to keep.

        Args:
            salience: [B,N] float.
            mask: [B,N] bool.

        Returns:
            [B] long, between 1 and the valid tokens of the sample.
        """

    @abstractmethod
    def bound(self, tokens: int) -> int:
        """Largest number that ``tokens`` valid tokens can give, without looking at data."""


def _checked(compression: float) -> float:
    if not compression >= 1.0:
        raise UserError(
            f"compression={compression}: expected at least 1 (valid tokens in per token out); 2.37 is the paper's"
        )
    return float(compression)


class FixedBudget(Budget):
    """``K = round(N_valid / compression)``.

    Args:
        compression: valid tokens in per token out, at least 1.
    """

    def __init__(self, compression: float = 2.37) -> None:
        super().__init__()
        self.compression = _checked(compression)

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """[B] long."""
        return (mask.sum(1).double() / self.compression).round().long().clamp(min=1)

    def bound(self, tokens: int) -> int:
        """Rounded share of ``tokens``."""
        return max(1, round(tokens / self.compression))


class EntropyBudget(Budget):
    """Keeps ``rho * exp(entropy of the salience distribution)`` tokens: rich inputs keep more.

    A controller moves ``rho`` in training so that mean(N_valid) / mean(K) meets ``compression``; it is the same on
    every rank, is saved with the module, and rests in evaluation.

    Args:
        compression: target of valid tokens in per token out, at least 1.
        temperature: of the softmax over the salience of a sample.
        floor: least K, as a share of N_valid / compression.
        ceiling: largest K, as a share of N_valid / compression.
        gain: strength of the controller's correction per training step.
        momentum: of its running means of N_valid and K.
    """

    rho: Tensor
    averages: Tensor

    def __init__(
        self,
        compression: float = 2.37,
        temperature: float = 0.1,
        floor: float = 0.5,
        ceiling: float = 2.0,
        gain: float = 0.1,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.compression = _checked(compression)
        if not 0.0 < floor <= 1.0 <= ceiling:
            raise UserError(f"floor={floor}, ceiling={ceiling}: expected 0 < floor <= 1 <= ceiling")
        self.temperature, self.floor, self.ceiling = temperature, floor, ceiling
        self.gain, self.momentum = gain, momentum
        self.register_buffer("rho", torch.tensor(1.0 / self.compression, dtype=torch.float64))
        self.register_buffer("averages", torch.zeros(2, dtype=torch.float64))

    def effective_tokens(self, salience: Tensor, mask: Tensor) -> Tensor:
        """Perplexity of softmax(salience / temperature) over valid tokens, [B] float."""
        logits = (salience.detach().double() / self.temperature).masked_fill(~mask, -float("inf"))
        p = torch.softmax(logits, dim=1)
        return torch.exp(-torch.xlogy(p, p).sum(1))

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        """[B] long; in training also moves the controller by one step."""
        valid = mask.sum(1)
        if self.compression == 1.0:
            return valid
        target = valid.double() / self.compression
        counts = (self.rho * self.effective_tokens(salience, mask)).clamp(
            self.floor * target, self.ceiling * target
        )
        counts = counts.round().long().clamp(min=1).minimum(valid)
        if self.training:
            self._control(valid, counts)
        return counts

    @torch.no_grad()
    def _control(self, valid: Tensor, counts: Tensor) -> None:
        seen = torch.stack([valid.sum(), counts.sum()]).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        first = self.averages[0] == 0
        mean = torch.where(first, seen, self.momentum * self.averages + (1 - self.momentum) * seen)
        self.averages.copy_(mean)
        error = torch.log(mean[0] / (mean[1] * self.compression))
        # A clipped K does not follow rho, so rho is kept where it still acts.
        self.rho.mul_(torch.exp(self.gain * error)).clamp_(0.01 / self.compression, 100.0)

    def bound(self, tokens: int) -> int:
        """The ceiling."""
        return min(tokens, max(1, math.ceil(self.ceiling * tokens / self.compression)))


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

    def bound(self, tokens: int) -> int:
        """All tokens."""
        return tokens
