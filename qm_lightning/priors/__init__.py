"""Causal transformers over merged tokens."""

from qm_lightning.priors.ar_prior import ARPrior, PriorOutput
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.growing import Encoder
from qm_lightning.priors.label_mask import label_layout, prefix_label_mask
from qm_lightning.priors.label_prior import LabelPrior, keep_first_blocks
from qm_lightning.priors.one_shot import Branches, greedy_labels, one_shot, scored_labels
from qm_lightning.priors.streaming import StreamingPrior, check_streaming, streaming_targets

__all__ = [
    "ARPrior",
    "Branches",
    "Encoder",
    "KVCache",
    "LabelPrior",
    "PriorOutput",
    "StreamingPrior",
    "check_streaming",
    "greedy_labels",
    "keep_first_blocks",
    "label_layout",
    "one_shot",
    "prefix_label_mask",
    "scored_labels",
    "streaming_targets",
]
