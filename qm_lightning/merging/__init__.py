"""Mergers: Tokens -> MergedTokens, one method a file."""

from qm_lightning.merging.base import BudgetMerger, Merger
from qm_lightning.merging.budget import Budget, FixedBudget, MassBudget
from qm_lightning.merging.dynamic_vit import DynamicViT
from qm_lightning.merging.entropy_budget import EntropyBudget
from qm_lightning.merging.evit import EViT
from qm_lightning.merging.no_merge import NoMerge
from qm_lightning.merging.pitome import PiToMe
from qm_lightning.merging.quickmerge import QuickMerge
from qm_lightning.merging.random_prune import RandomPrune
from qm_lightning.merging.salience import Salience
from qm_lightning.merging.schedule import Schedule
from qm_lightning.merging.scope import SCOPE
from qm_lightning.merging.streaming_entropy import EntropyThreshold
from qm_lightning.merging.streaming_pooling import DynamicPooling
from qm_lightning.merging.streaming_quickmerge import StreamingQuickMerge
from qm_lightning.merging.streaming_router import LearnedRouter
from qm_lightning.merging.streaming_stride import FixedStride
from qm_lightning.merging.tofu import ToFu
from qm_lightning.merging.tome import ToMe
from qm_lightning.merging.topk_prune import TopKPrune
from qm_lightning.merging.trim_tokenator import TrimTokenator
from qm_lightning.merging.uniform_pool import UniformPool

__all__ = [
    "SCOPE",
    "Budget",
    "BudgetMerger",
    "DynamicPooling",
    "DynamicViT",
    "EViT",
    "EntropyBudget",
    "EntropyThreshold",
    "FixedBudget",
    "FixedStride",
    "LearnedRouter",
    "MassBudget",
    "Merger",
    "NoMerge",
    "PiToMe",
    "QuickMerge",
    "RandomPrune",
    "Salience",
    "Schedule",
    "StreamingQuickMerge",
    "ToFu",
    "ToMe",
    "TopKPrune",
    "TrimTokenator",
    "UniformPool",
]
