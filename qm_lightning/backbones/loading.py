"""Loads the encoder of a Hugging Face model from a folder or the cache, safely, with clear errors."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from qm_lightning.backbones.recording import IMPLEMENTATION
from qm_lightning.errors import UserError

# Heads that AutoModel builds beside the encoder and last_hidden_state never passes through.
_UNUSED_PARTS = {"pooler", "head"}


def load_encoder(name_or_path: str, dtype: torch.dtype, download: bool) -> PreTrainedModel:
    """Load the part of a model that encodes, with our attention function in it.

    Of an encoder-decoder (T5) that is the encoder, of a model of two towers (CLIP, SigLIP) the vision tower.
    Only safetensors are read and no code from the model's folder is run.

    Args:
        name_or_path: folder, or a model's name on the Hugging Face Hub, as ``find_source`` gives it.
        dtype: of the weights.
        download: whether the network may be used; otherwise a name is looked up in the local cache only.

    Raises:
        UserError: nothing there, unreadable or incomplete weights, or a family whose attention is unseen.
    """
    options = {"local_files_only": not download, "trust_remote_code": False}
    try:
        with _quiet(), _network(download):
            model, report = AutoModel.from_pretrained(
                name_or_path,
                attn_implementation=IMPLEMENTATION,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(_loading_failed(name_or_path, download, error)) from error
    encoder = _encoder(model)
    _check_dispatch(encoder, name_or_path)
    _check_plain(encoder, name_or_path)
    _check_complete(model, encoder, set(report["missing_keys"]), name_or_path)
    return encoder


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its report of missing poolers: ``_check_complete`` says what matters."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Keep off the network unless ``allowed``: despite local_files_only huggingface_hub still calls home."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find_source(name_or_path: str) -> str:
    """The folder, or the model's name if ``name_or_path`` cannot mean a folder.

    Raises:
        UserError: it means a folder, and there is none with a model.
    """
    path = Path(name_or_path).expanduser()
    shipped = path.parts[:1] == ("pretrained",)  # where the project's own backbones are written
    means_folder = (
        path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1 or shipped
    )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"backbone folder {name_or_path!r} has no config.json; expected a folder written by "
            "save_pretrained; give the folder that holds config.json and model.safetensors"
        )
    if means_folder and not path.is_dir():
        recipe = f"python train.py fit --config configs/experiment/backbone_{path.name}.yaml"
        mend = f"train it first: {recipe}" if shipped else "check the path"
        raise UserError(
            f"backbone folder {name_or_path!r} does not exist; expected a folder written by save_pretrained; {mend}"
        )
    return str(path) if path.is_dir() else name_or_path


def _loading_failed(name_or_path: str, download: bool, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    if Path(name_or_path).expanduser().is_dir():
        mend = "check the folder's files (only safetensors weights are read)"
    elif download:
        mend = "check the name and the network"
    else:
        mend = "give a folder that exists, or set download=true to fetch a model by its name"
    return f"backbone {name_or_path!r} could not be loaded ({reason}); expected a Hugging Face model; {mend}"


def _encoder(model: PreTrainedModel) -> PreTrainedModel:
    config = model.config
    if hasattr(config, "vision_config"):
        tower = getattr(model, "vision_model", None)
        if not isinstance(tower, PreTrainedModel):
            raise UserError(
                f"{type(model).__name__} joins pictures and text inside one model; expected an encoder of "
                "one modality, or a model with a vision tower of its own (CLIP, SigLIP); choose its encoder"
            )
        return tower
    # T5EncoderModel saves a config without is_encoder_decoder, and AutoModel still makes both halves of it.
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        encoder = model.get_encoder()
        if not isinstance(encoder, PreTrainedModel):
            raise UserError(f"{type(model).__name__} has no separate encoder; choose an encoder or a decoder")
        return encoder
    return model


def _check_dispatch(encoder: PreTrainedModel, name_or_path: str) -> None:
    """Families that call no attention function of the registry never import it."""
    source = sys.modules[type(encoder).__module__]
    if not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
        raise unseen(encoder.config, name_or_path)


def _check_plain(encoder: PreTrainedModel, name_or_path: str) -> None:
    config = encoder.config
    sizes = [
        getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    ]
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"{name_or_path!r} (family {config.model_type}) changes its width or heads from stage to stage; "
            "expected a plain transformer with one token per patch or word; choose another backbone"
        )


def unseen(config: PretrainedConfig, name_or_path: str) -> UserError:
    """The error for a family whose attention does not pass through the registry."""
    return UserError(
        f"the attention of {name_or_path!r} (family {config.model_type}) cannot be seen: it does not go "
        "through transformers' attention registry; expected a family that does (BERT, Llama, Qwen, T5, ViT, "
        "DINOv2, DINOv3, CLIP, SigLIP, VideoMAE, ViViT, ...); choose another backbone"
    )


def _check_complete(
    model: PreTrainedModel, encoder: PreTrainedModel, missing: set[str], name_or_path: str
) -> None:
    used = {id(parameter) for parameter in encoder.parameters()}
    lost = sorted(
        name
        for name, parameter in model.named_parameters()
        if name in missing and id(parameter) in used and not _UNUSED_PARTS & set(name.split("."))
    )
    if lost:
        raise UserError(
            f"backbone {name_or_path!r} lacks {len(lost)} weights (first: {lost[0]}), which would be random; "
            "expected a complete checkpoint; save it again with save_pretrained"
        )


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the weights that tokens depend on, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if _UNUSED_PARTS & set(name.split(".")):
            continue  # absent from many checkpoints, and then random
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_json(name_or_path: str, filename: str, download: bool) -> dict[str, Any] | None:
    """Read a JSON file from a model's folder or cache; ``None`` if it has none."""
    try:
        with _network(download):
            path = cached_file(name_or_path, filename, local_files_only=not download)
    except OSError:
        return None
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else None
