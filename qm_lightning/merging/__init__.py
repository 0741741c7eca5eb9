"""Mergers: Tokens -> MergedTokens, one method a file."""

from qm_lightning.merging.base import Merger
from qm_lightning.merging.budget import Budget, EntropyBudget, FixedBudget, MassBudget
from qm_lightning.merging.no_merge import NoMerge
from qm_lightning.merging.prune import RandomPrune, TopKPrune
from qm_lightning.merging.quickmerge import QuickMerge
from qm_lightning.merging.salience import Salience
from qm_lightning.merging.streaming_entropy import EntropyThreshold
from qm_lightning.merging.streaming_pooling import DynamicPooling
from qm_lightning.merging.streaming_quickmerge import StreamingQuickMerge
from qm_lightning.merging.streaming_router import LearnedRouter
from qm_lightning.merging.streaming_stride import FixedStride
from qm_lightning.merging.tome import ToMe
from qm_lightning.merging.uniform import UniformPool

__all__ = [
    "Budget",
    "DynamicPooling",
    "EntropyBudget",
    "EntropyThreshold",
    "FixedBudget",
    "FixedStride",
    "LearnedRouter",
    "MassBudget",
    "Merger",
    "NoMerge",
    "QuickMerge",
    "RandomPrune",
    "Salience",
    "StreamingQuickMerge",
    "ToMe",
    "TopKPrune",
    "UniformPool",
]
