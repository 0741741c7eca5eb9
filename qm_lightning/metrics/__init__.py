"""Metrics: torchmetrics classes whose states add up over batches and ranks."""

from qm_lightning.metrics.accuracy import ExactMatch, TokenAccuracy
from qm_lightning.metrics.compression import Compression
from qm_lightning.metrics.encoders import ExactEncoder, SentenceEncoder, StringEncoder
from qm_lightning.metrics.fidelity import RelativeError
from qm_lightning.metrics.groups import MeanSpan, OverlapRate, group_extents
from qm_lightning.metrics.kept import TokensKept, TokensKeptPercentile
from qm_lightning.metrics.labels import LabelScores
from qm_lightning.metrics.likelihood import BitsPerToken, NatsPerToken, Perplexity
from qm_lightning.metrics.quality import QualityMetrics

__all__ = [
    "BitsPerToken",
    "Compression",
    "ExactEncoder",
    "ExactMatch",
    "LabelScores",
    "MeanSpan",
    "NatsPerToken",
    "OverlapRate",
    "Perplexity",
    "QualityMetrics",
    "RelativeError",
    "SentenceEncoder",
    "StringEncoder",
    "TokenAccuracy",
    "TokensKept",
    "TokensKeptPercentile",
    "group_extents",
]
