"""All evaluation metrics of a run under their log names."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import MetricCollection

from qm_lightning.losses import relative_error
from qm_lightning.metrics.accuracy import ExactMatch, TokenAccuracy
from qm_lightning.metrics.compression import Compression
from qm_lightning.metrics.fidelity import RelativeError
from qm_lightning.metrics.groups import MeanSpan, OverlapRate
from qm_lightning.metrics.kept import TokensKept, TokensKeptPercentile
from qm_lightning.metrics.likelihood import BitsPerToken, NatsPerToken, Perplexity
from qm_lightning.priors import PriorOutput
from qm_lightning.tokens import MergedTokens, Tokens


class QualityMetrics(nn.Module):
    """Quality against tokens: what ``val/...`` and ``test/...`` report.

    The states of metrics that share them are kept once. torchmetrics could find such groups itself, but by
    comparing values after the first batch, which merges metrics that merely start out equal.

    Args:
        max_tokens: largest number of kept tokens that percentiles tell apart.
    """

    def __init__(self, max_tokens: int = 4096) -> None:
        super().__init__()
        self.targets = MetricCollection(
            {
                "quality/nats": NatsPerToken(),
                "quality/bits": BitsPerToken(),
                "quality/perplexity": Perplexity(),
                "quality/exact": ExactMatch(),
                "quality/top1": TokenAccuracy(),
            },
            compute_groups=[
                ["quality/nats", "quality/bits", "quality/perplexity"],
                ["quality/exact"],
                ["quality/top1"],
            ],
        )
        self.kept = MetricCollection(
            {
                "tokens/kept_mean": TokensKept(max_tokens),
                "tokens/kept_p5": TokensKeptPercentile(0.05, max_tokens),
                "tokens/kept_p95": TokensKeptPercentile(0.95, max_tokens),
            },
            compute_groups=[["tokens/kept_mean", "tokens/kept_p5", "tokens/kept_p95"]],
        )
        self.compression = Compression()
        self.error = RelativeError()
        self.overlap = OverlapRate()
        self.span = MeanSpan()

    def update(
        self, tokens: Tokens, merged: MergedTokens, output: PriorOutput, targets: Tensor, valid: Tensor
    ) -> None:
        """Add a batch.

        Args:
            tokens: of the backbone.
            merged: of the merger.
            output: of the prior.
            targets: [B,T] long, -100 = padding.
            valid: [B] bool, False = padding sample.
        """
        kept = merged.mask.sum(dim=1)
        self.targets.update(output.logits, targets, valid)
        self.kept.update(kept, valid)
        self.compression.update(tokens.counts, kept, valid)
        self.error.update(relative_error(tokens, merged), valid)
        self.overlap.update(merged.assignment, merged.mask, valid)
        self.span.update(merged.assignment, merged.mask, valid)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by log name (``group/name``), reduced over all ranks."""
        values: dict[str, Tensor] = {
            **self.targets.compute(),
            **self.kept.compute(),
            "tokens/compression": self.compression.compute(),
            "merged/error": self.error.compute(),
            "merged/overlap": self.overlap.compute(),
            "merged/span": self.span.compute(),
        }
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metric in (self.targets, self.kept, self.compression, self.error, self.overlap, self.span):
            metric.reset()
