"""The files of an export: their names, and how they are read and replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from qm_lightning import __version__
from qm_lightning.errors import UserError

# 1: one merger; 2: several, by modality, before one prior. Each export has the lowest that can hold it.
ONE, SEVERAL = 1, 2
FORMAT = SEVERAL
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def read_config(path: Path) -> dict[str, Any]:
    """Content of an export's config.json.

    Raises:
        UserError: it is missing, broken, of another kind, or of a newer format.
    """
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} has no {CONFIG}; expected a directory of save_pretrained; check the path")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({error}); expected that of save_pretrained; export again"
        ) from error
    found = config.get("format") if isinstance(config, dict) else None
    if not isinstance(found, int) or "prior" not in config:
        raise UserError(
            f"{file} is no export of this project; expected that of save_pretrained; check the path"
        )
    if found > FORMAT:
        raise UserError(
            f"{file} has format {found}; expected at most {FORMAT}, all that qm_lightning {__version__} knows; "
            "use a newer version"
        )
    return dict(config)


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors by name.

    Raises:
        UserError: the file is missing or broken.
    """
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}; expected a complete export; export again")
    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(file)
        return weights
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is broken ({error}); expected a complete file; export again") from error


def replace_file(file: Path, content: bytes) -> None:
    """Write beside the target, then rename."""
    staging = file.with_name(f".{file.name}.tmp")
    staging.write_bytes(content)
    staging.replace(file)
