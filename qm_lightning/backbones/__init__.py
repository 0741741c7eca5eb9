"""Frozen Hugging Face encoders that give ``Tokens``, and the small ones of the demo."""

from qm_lightning.backbones.hf import HFBackbone

__all__ = ["HFBackbone"]
