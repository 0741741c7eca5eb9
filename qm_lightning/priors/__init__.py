"""Causal transformers over merged tokens."""

from qm_lightning.priors.ar_prior import ARPrior, PriorOutput
from qm_lightning.priors.cache import KVCache

__all__ = ["ARPrior", "KVCache", "PriorOutput"]
