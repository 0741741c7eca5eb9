"""Small Hugging Face models with fresh weights: the demo's backbones, pre-trained by the project itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
)

_WIDE = 0.1  # standard deviation of a small vision model's fresh matrices


def small_vit(
    image_size: int = 64,
    patch_size: int = 8,
    channels: int = 1,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
) -> ViTModel:
    """Vision transformer with a class token: (image_size / patch_size)^2 patches, 0.35 M weights.

    Its positions start as sines of row and column and its matrices five times wider than the Hugging Face default:
    so small a model then learns in 2,000 steps what it otherwise has not learned by then (docs/backbones.md).
    """
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    model = ViTModel(config, add_pooling_layer=False)
    _start_wide(model)
    _start_from_sines(model, image_size // patch_size)
    return model


@torch.no_grad()
def _start_wide(model: ViTModel | VideoMAEModel) -> None:
    for weight in (p for p in model.parameters() if p.ndim == 2):
        weight.normal_(0.0, _WIDE)
    patches = model.embeddings.patch_embeddings.projection.weight
    # The sum over a patch's pixels varies as much as the sum over a token's channels in the other layers.
    patches.normal_(0.0, _WIDE * (patches.shape[0] / patches[0].numel()) ** 0.5)


@torch.no_grad()
def _start_from_sines(model: ViTModel, side: int) -> None:
    """Position embeddings [1,1+side^2,width]: sine and cosine of the row, then of the column, at width / 4 rates."""
    places = model.embeddings.position_embeddings
    rates = places.shape[-1] // 4
    angles = torch.arange(side)[:, None] * (math.pi / 2) / 100 ** (torch.arange(rates) / rates)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], dim=-1).flatten(
        0, 1
    )
    places[0, 1:, : grid.shape[-1]] = grid


def small_llama(
    vocab_size: int = 257,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    max_tokens: int = 1024,
) -> LlamaModel:
    """Byte-level causal transformer: ids 0 to 255 are bytes, the last id ends a text."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=8 * width // 3,
        max_position_embeddings=max_tokens,
        bos_token_id=None,
        eos_token_id=vocab_size - 1,
        pad_token_id=None,
    )
    return LlamaModel(config)


def small_videomae(
    image_size: int = 64,
    patch_size: int = 8,
    frames: int = 8,
    tubelet_size: int = 2,
    channels: int = 1,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
) -> VideoMAEModel:
    """Video transformer: frames / tubelet_size * (image_size / patch_size)^2 tubelets, no class token.

    Its matrices start as wide as ``small_vit``'s; its positions are sines already.
    """
    config = VideoMAEConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_frames=frames,
        tubelet_size=tubelet_size,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        use_mean_pooling=False,
    )
    model = VideoMAEModel(config)
    _start_wide(model)
    return model


def preprocessing_of(model: PreTrainedModel, mean: float = 0.5, std: float = 0.5) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says of a small model: bytes / 255, less mean, over std."""
    size, channels = int(model.config.image_size), int(model.config.num_channels)
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * channels,
        "image_std": [std] * channels,
    }


def save_backbone(model: PreTrainedModel, folder: str | Path, preprocessing: dict[str, Any] | None) -> None:
    """Write weights, config and, unless ``None``, ``preprocessor_config.json``."""
    model.save_pretrained(folder)
    if preprocessing is not None:
        text = json.dumps(preprocessing, indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
