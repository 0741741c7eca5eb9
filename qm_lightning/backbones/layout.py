"""Where a backbone's tokens lie: which layers are watched, and each token's coordinates."""

from __future__ import annotations

import inspect
import re
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qm_lightning.errors import UserError

Modality = Literal["text", "image", "video"]

# Families that adapt their position encoding to the picture's size; the others take the size in their config.
_ANY_SIZE = {"dinov2", "dinov2_with_registers", "dinov3_vit"}


def choose_layers(layers: int | list[int], depth: int) -> tuple[int, ...]:
    """Turn a count into evenly spread layers, or check explicit ones.

    Args:
        layers: that many, each the last of its share of the depth (all layers if there are fewer), or
            indices; negative ones count from the last.
        depth: number of layers of the model.

    Raises:
        UserError: no layer, or an index that the model does not have.
    """
    if isinstance(layers, int):
        count = min(layers, depth)
        chosen = [(i + 1) * depth // count - 1 for i in range(count)]
    else:
        chosen = sorted({i + depth if i < 0 else i for i in layers})
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise UserError(
            f"layers={layers} was asked of a backbone with {depth} layers; expected a count from 1, or "
            f"indices from 0 to {depth - 1}; change backbone.layers"
        )
    return tuple(chosen)


def attention_modules(model: nn.Module) -> dict[nn.Module, int]:
    """Attention modules and the layer they belong to: the first number in their name."""
    found: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        match = re.search(r"(?:^|\.)(\d+)\.", name)
        if match and hasattr(module, "is_causal"):
            found[module] = int(match[1])
    return found


def find_modality(model: PreTrainedModel) -> Modality:
    """What a model reads.

    Raises:
        UserError: neither text nor pictures nor clips.
    """
    if model.main_input_name == "input_ids":
        return "text"
    if model.main_input_name == "pixel_values":
        return "video" if hasattr(model.config, "num_frames") else "image"
    raise UserError(
        f"{type(model).__name__} reads {model.main_input_name!r}; expected a model that reads input_ids or "
        "pixel_values; choose another backbone"
    )


def find_max_tokens(model: PreTrainedModel) -> int | None:
    """Longest text that a model's position encoding was made for; ``None``: no limit, or not text."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or find_modality(model) != "text":
        return None
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(limit) - int(table.padding_idx) - 1  # RoBERTa counts positions from padding_idx + 1
    return int(limit)


def find_sample_tokens(model: PreTrainedModel) -> int | None:
    """Most tokens of a sample, special ones apart; ``None``: a sample may have any number."""
    config = model.config
    size = getattr(config, "image_size", None)
    if find_modality(model) == "text":
        return find_max_tokens(model)
    if size is None or config.model_type in _ANY_SIZE:
        return None
    tube, patch_height, patch_width = _patch(config)
    height, width = _pair(size)
    return (getattr(config, "num_frames", tube) // tube) * (height // patch_height) * (width // patch_width)


def patch_grid(config: PretrainedConfig, pixel_values: Tensor) -> tuple[int, ...]:
    """Patches of a picture (rows, columns) or of a clip (tubelets, rows, columns).

    Args:
        config: of an image or video model.
        pixel_values: [B,C,H,W], or [B,F,C,H,W] for a video model.

    Raises:
        UserError: channels, frames or size are not what the model takes.
    """
    channels, height, width = pixel_values.shape[-3:]
    if channels != config.num_channels:
        raise UserError(
            f"the pictures have {channels} channels; expected {config.num_channels}, as the backbone was "
            "trained; let the data use the backbone's processor"
        )
    tube, patch_height, patch_width = _patch(config)
    if height % patch_height or width % patch_width:
        raise UserError(
            f"the pictures are {height} x {width} pixels; expected multiples of the patch, "
            f"{patch_height} x {patch_width}; resize them, or let the data use the backbone's processor"
        )
    _check_size(config, height, width)
    grid = (height // patch_height, width // patch_width)
    if pixel_values.dim() == 4 or not hasattr(config, "num_frames"):
        return grid
    frames = pixel_values.shape[1]
    if frames != config.num_frames:
        raise UserError(
            f"the clips have {frames} frames; expected {config.num_frames}, as the backbone was trained; "
            f"set the data's number of frames to {config.num_frames}"
        )
    return (frames // tube, *grid)


def _patch(config: PretrainedConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of one patch."""
    tubelet = getattr(config, "tubelet_size", 1)
    if not isinstance(tubelet, int):
        frames, height, width = tubelet
        return int(frames), int(height), int(width)
    height, width = _pair(config.patch_size)
    return tubelet, height, width


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_size(config: PretrainedConfig, height: int, width: int) -> None:
    size = getattr(config, "image_size", None)
    if size is None or config.model_type in _ANY_SIZE or _pair(size) == (height, width):
        return
    expected = " x ".join(map(str, _pair(size)))
    raise UserError(
        f"the pictures are {height} x {width} pixels; expected {expected}, the only size that this "
        f"{config.model_type} backbone takes; let the data use the backbone's processor"
    )


def counts_positions(model: PreTrainedModel) -> bool:
    """Whether a text model takes the place of each token, which it else counts over padding too.

    RoBERTa and its kin count for themselves, from ids that are no padding: their table of places has a row for it.
    """
    own = any(
        isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
        for name, module in model.named_modules()
    )
    return not own and "position_ids" in inspect.signature(model.forward).parameters


def grid_positions(grid: tuple[int, ...], specials: int, frames: int | None, device: torch.device) -> Tensor:
    """Coordinates of special tokens, then of the patches in raster order, picture by picture.

    A class or register token stands for the whole picture, so it lies in its middle: a valid coordinate,
    and no patch is far from it.

    Args:
        grid: patches along each coordinate.
        specials: number of class, distillation and register tokens, which come first.
        frames: number of pictures if they are the frames of a clip: each gets its number as first coordinate.
        device: of the result.

    Returns:
        [frames or 1, specials + patches, P] long.
    """
    axes = [torch.arange(n, device=device) for n in grid]
    patches = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    middle = torch.tensor([n // 2 for n in grid], device=device)
    picture = torch.cat([middle.expand(specials, -1), patches]).unsqueeze(0)
    if frames is None:
        return picture
    number = torch.arange(frames, device=device).view(-1, 1, 1).expand(-1, picture.shape[1], -1)
    return torch.cat([number, picture.expand(frames, -1, -1)], dim=-1)
