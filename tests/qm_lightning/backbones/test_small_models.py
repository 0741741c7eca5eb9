"""The demo's backbones: built, saved and loaded like any other model."""

from __future__ import annotations

from pathlib import Path

import torch

from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import (
    preprocessing_of,
    save_backbone,
    small_llama,
    small_videomae,
    small_vit,
)


def test_vit(tmp_path: Path) -> None:
    model = small_vit(image_size=32, patch_size=8, width=32, depth=2)
    save_backbone(model, tmp_path, preprocessing_of(model, mean=0.25, std=0.4))
    backbone = HFBackbone(str(tmp_path))
    pixels = torch.randn(2, 1, 32, 32)
    tokens = backbone({"pixel_values": pixels})
    assert tokens.values.shape == (2, 16, 32)
    assert torch.equal(tokens.values, model.eval()(pixels).last_hidden_state[:, 1:])
    settings = backbone.processor_config()
    assert settings is not None
    assert settings["size"] == {"height": 32, "width": 32}
    assert (settings["image_mean"], settings["image_std"], settings["do_rescale"]) == ([0.25], [0.4], True)


def test_llama(tmp_path: Path) -> None:
    model = small_llama(width=32, depth=2, max_tokens=64)
    save_backbone(model, tmp_path, None)
    backbone = HFBackbone(str(tmp_path))
    ids = torch.arange(193, 257).view(1, 64)
    tokens = backbone({"input_ids": ids})
    assert torch.equal(tokens.values, model.eval()(ids).last_hidden_state)
    assert (backbone.causal, backbone.max_tokens, backbone.processor_config()) == (True, 64, None)
    assert not (tmp_path / "preprocessor_config.json").exists()


def test_videomae(tmp_path: Path) -> None:
    model = small_videomae(image_size=16, frames=4, width=32, depth=2)
    save_backbone(model, tmp_path, preprocessing_of(model))
    backbone = HFBackbone(str(tmp_path))
    clip = torch.randn(2, 4, 1, 16, 16)
    tokens = backbone({"pixel_values": clip})
    assert tokens.values.shape == (2, 8, 32)
    assert torch.equal(tokens.values, model.eval()(clip).last_hidden_state)
    assert backbone.modality == "video"
