"""LightningModules: the QuickMerge module, its kin for label sets, and the pre-training of small backbones."""

from qm_lightning.modules.multimodal import ModalityPath, MultimodalModule
from qm_lightning.modules.nxtp import LabelDecoding, NXTPModule
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.pretrain import BackbonePretrainModule
from qm_lightning.modules.quickmerge import LossWeights, QuickMergeModule
from qm_lightning.modules.streaming import StreamingModule
from qm_lightning.modules.words import WordVectorsModule

__all__ = [
    "BackbonePretrainModule",
    "LabelDecoding",
    "LossWeights",
    "ModalityPath",
    "MultimodalModule",
    "NXTPModule",
    "OptimizerOptions",
    "QuickMergeModule",
    "StreamingModule",
    "WordVectorsModule",
]
