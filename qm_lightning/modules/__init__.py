"""LightningModules: the QuickMerge module and the pre-training of small backbones."""

from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.pretrain import BackbonePretrainModule
from qm_lightning.modules.quickmerge import LossWeights, QuickMergeModule
from qm_lightning.modules.streaming import StreamingModule

__all__ = ["BackbonePretrainModule", "LossWeights", "OptimizerOptions", "QuickMergeModule", "StreamingModule"]
