"""A budget by the entropy of the salience, held to a mean compression (spec quickmerge.md, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget, checked_compression


class EntropyBudget(Budget):
    """Keeps ``rho * exp(entropy of the salience distribution)`` tokens: rich inputs keep more.

    A controller moves ``rho`` in training so that mean(N_valid) / mean(K) meets ``compression``; it is the
    same on every rank, is saved with the module, and rests in evaluation.

    Args:
        compression: target of valid tokens in per token out, at least 1.
        temperature: of the softmax over the salience of a sample.
        floor: least K, as a share of N_valid / compression.
        ceiling: largest K, as a share of N_valid / compression.
        gain: strength of the controller's correction per training step.
        momentum: of its running means of N_valid and K.
        strength: how far K follows the entropy, in [0,1]: ``K = (N_valid / compression)^(1 - strength) * (rho *
            N_eff)^strength`` (ours). 1 is the specified rule; 0 a fixed budget. Where tokens suffice, handing rich
            inputs still more of them helps little and leaves the others short.
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
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        self.compression = checked_compression(compression)
        if not 0.0 < floor <= 1.0 <= ceiling:
            raise UserError(f"floor={floor}, ceiling={ceiling}: expected 0 < floor <= 1 <= ceiling")
        if not 0.0 <= strength <= 1.0:
            raise UserError(f"EntropyBudget(strength={strength}): expected a share in [0, 1]")
        self.temperature, self.floor, self.ceiling = temperature, floor, ceiling
        self.gain, self.momentum, self.strength = gain, momentum, strength
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
        wanted = self.rho * self.effective_tokens(salience, mask)
        if self.strength < 1.0:
            wanted = target * (wanted / target) ** self.strength
        counts = wanted.clamp(self.floor * target, self.ceiling * target)
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

    def steepest(self, tokens: int) -> float:
        """The floor, rounded."""
        return min(float(tokens), 1.5 * self.compression / self.floor)
