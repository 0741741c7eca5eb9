"""Recall, precision and F1 of predicted labels, by the similarity of strings (generative.md, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from qm_lightning.metrics.encoders import ExactEncoder, StringEncoder


def recall_precision_f1(similarity: Tensor) -> tuple[float, float, float]:
    """Scores of one sample.

    Args:
        similarity: [M,N], M targets and N predictions.

    Returns:
        ``R = mean_i max_j``, ``P = mean_j max_i`` and ``2 R P / (R + P)``, 0 where that is undefined.
    """
    recall = float(similarity.amax(dim=1).mean())
    precision = float(similarity.amax(dim=0).mean())
    both = recall + precision
    return recall, precision, 2 * recall * precision / both if both > 0 else 0.0


class LabelScores(Metric):
    """Mean over samples of recall, precision and F1, and the share of samples whose label set is exact.

    Args:
        encoder: compares strings; ``None``: they are equal or not.
        top_k: likeliest predictions that count.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, encoder: StringEncoder | None = None, top_k: int = 10) -> None:
        super().__init__()
        self.encoder = encoder or ExactEncoder()
        self.top_k = top_k
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """Add samples.

        Args:
            predictions: labels of each sample, the likeliest first; none counts as one empty string.
            targets: labels of each sample, at least one.
        """
        for found, wanted in zip(predictions, targets, strict=True):
            best = list(found[: self.top_k])
            scores = recall_precision_f1(self.encoder.similarity(list(wanted), best or [""]))
            exact = float(set(best) == set(wanted))
            added = torch.tensor([*scores, exact, len(best)], dtype=torch.float64)
            self.sums = self.sums + added.to(self.sums.device)
            self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """``recall``, ``precision``, ``f1``, ``exact`` and ``predicted`` (labels per sample)."""
        means = (self.sums / self.count).float()
        return dict(zip(("recall", "precision", "f1", "exact", "predicted"), means, strict=True))
