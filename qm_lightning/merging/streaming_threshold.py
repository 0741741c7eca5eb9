"""The threshold at which a span closes: moved by a controller in training, at rest in evaluation (ours)."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn

from qm_lightning.ranks import sum_over_ranks


class ClosingThreshold(nn.Module):
    """Closes a span where a causal signal exceeds a threshold.

    A threshold fixed beforehand keeps each decision a function of the past; a percentile of the sequence
    would not. The first training step guesses it from the signal's mean and deviation, as if it were normal;
    each further one moves it by the relative error in the number of spans, in units of the deviation. Every
    rank holds the same value, and the checkpoint, too.

    Args:
        compression: tokens per span to meet, over all samples.
        threshold: before training.
        gain: deviations that the threshold moves when there are twice as many spans as wanted.
        momentum: of the running deviation.
    """

    threshold: Tensor
    deviation: Tensor

    def __init__(
        self, compression: float, threshold: float, gain: float = 0.2, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.compression, self.gain, self.momentum = compression, gain, momentum
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("deviation", torch.zeros((), dtype=torch.float64))

    def forward(self, signal: Tensor) -> Tensor:
        """Where spans close, [B,N] float -> [B,N] bool; everywhere if nothing is to be merged."""
        if self.compression == 1.0:
            return torch.ones_like(signal, dtype=torch.bool)
        return signal.detach() > self.threshold

    @torch.no_grad()
    def adapt(self, signal: Tensor, mask: Tensor, groups: Tensor) -> None:
        """Move the threshold by one step.

        Args:
            signal: [B,N] float.
            mask: [B,N] bool.
            groups: [B] long, spans that came of it (those that a limit ended included).
        """
        values = signal.double().masked_fill(~mask, 0.0)
        sums = torch.stack([mask.sum().double(), values.sum(), values.square().sum(), groups.sum().double()])
        tokens, total, squares, spans = sum_over_ranks(sums)[0].unbind()
        mean = total / tokens
        deviation = (squares / tokens - mean.square()).clamp(min=1e-12).sqrt()
        first = self.deviation == 0
        guess = mean + NormalDist().inv_cdf(1.0 - 1.0 / max(self.compression, 1.0 + 1e-6)) * deviation
        self.deviation.copy_(
            torch.where(first, deviation, self.momentum * self.deviation + (1 - self.momentum) * deviation)
        )
        excess = spans * self.compression / tokens - 1.0
        self.threshold.copy_(torch.where(first, guess, self.threshold + self.gain * self.deviation * excess))
