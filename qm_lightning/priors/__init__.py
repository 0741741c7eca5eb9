"""Causal transformers over merged tokens."""

from qm_lightning.priors.ar_prior import ARPrior, PriorOutput
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.streaming import StreamingPrior, check_streaming, streaming_targets

__all__ = ["ARPrior", "KVCache", "PriorOutput", "StreamingPrior", "check_streaming", "streaming_targets"]
