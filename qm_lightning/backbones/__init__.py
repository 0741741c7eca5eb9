"""Frozen Hugging Face encoders that give ``Tokens``, and the small ones of the demo."""

from qm_lightning.backbones.hf import HFBackbone
from qm_lightning.backbones.in_backbone import InBackbone
from qm_lightning.backbones.words import WordVectors

__all__ = ["HFBackbone", "InBackbone", "WordVectors"]
