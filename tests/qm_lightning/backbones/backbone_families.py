"""One tiny model per family, with random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 48}
TEXT = {**WIDE, "vocab_size": 60, "max_position_embeddings": 40}
GROUPED = {**TEXT, "num_key_value_heads": 2}
PICTURE = {**WIDE, "image_size": 24, "patch_size": 8, "num_channels": 3}
CLIP_TEXT = {**TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Family:
    modality: str
    build: Callable[[], hf.PreTrainedModel]
    specials: int = 0  # class, distillation and register tokens
    causal: bool = False


def _clip() -> hf.PreTrainedModel:
    return hf.CLIPModel(hf.CLIPConfig(vision_config=PICTURE, text_config=CLIP_TEXT))


def _siglip() -> hf.PreTrainedModel:
    return hf.SiglipModel(hf.SiglipConfig(vision_config=PICTURE, text_config=CLIP_TEXT))


def _t5() -> hf.PreTrainedModel:
    config = hf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    return hf.T5EncoderModel(config)


def _modernbert() -> hf.PreTrainedModel:
    config = hf.ModernBertConfig(
        **TEXT,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return hf.ModernBertModel(config)


def _gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=60, n_positions=40, n_embd=32, n_layer=3, n_head=4, bos_token_id=59, eos_token_id=59
    )
    return hf.GPT2LMHeadModel(config)


FAMILIES: dict[str, Family] = {
    "bert": Family("text", lambda: hf.BertModel(hf.BertConfig(**TEXT))),
    "roberta": Family("text", lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT))),
    "modernbert": Family("text", _modernbert),
    "gpt2": Family("text", _gpt2, causal=True),
    "llama": Family("text", lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)), causal=True),
    "qwen2": Family("text", lambda: hf.Qwen2Model(hf.Qwen2Config(**GROUPED)), causal=True),
    "qwen3": Family("text", lambda: hf.Qwen3Model(hf.Qwen3Config(**GROUPED, head_dim=16)), causal=True),
    "t5": Family("text", _t5),
    "vit": Family("image", lambda: hf.ViTModel(hf.ViTConfig(**PICTURE)), specials=1),
    "dinov2": Family("image", lambda: hf.Dinov2Model(hf.Dinov2Config(**PICTURE)), specials=1),
    "dinov3": Family(
        "image", lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**PICTURE, num_register_tokens=2)), specials=3
    ),
    "clip": Family("image", _clip, specials=1),
    "siglip": Family("image", _siglip),
    "videomae": Family(
        "video", lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**PICTURE, num_frames=4, tubelet_size=2))
    ),
    "vivit": Family(
        "video",
        lambda: hf.VivitModel(hf.VivitConfig(**PICTURE, num_frames=4, tubelet_size=[2, 8, 8])),
        specials=1,
    ),
}


def save_family(name: str, folder: Path) -> Path:
    """Save a tiny model of the family; its weights are large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if parameter.shape[-1] <= 64 else 0.1)
    model.save_pretrained(folder / name)
    return folder / name


def make_inputs(name: str, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    modality = FAMILIES[name].modality
    if modality == "image":
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    if modality == "video":
        return {"pixel_values": torch.randn(2, 4, 3, 24, 24, generator=generator)}
    ids = torch.randint(3, 59, (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[1, 13:] = 0
        ids[1, 13:] = 1  # RoBERTa's padding id, from which it takes positions
    return {"input_ids": ids, "attention_mask": mask}
