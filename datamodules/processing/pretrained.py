"""Small JSON files that lie beside a pre-trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.errors import DataError


def read_model_json(name_or_path: str, file: str) -> dict[str, Any] | None:
    """Read one JSON file of a model.

    Args:
        name_or_path: a folder, or a model's name on the Hugging Face hub, which is looked up in its local
            cache, and fetched if it is not there (unless transformers is told to stay offline).
        file: the file's name.

    Returns:
        What it holds; ``None`` if the model has no such file.

    Raises:
        DataError: the file is not a JSON object.
    """
    folder = Path(name_or_path).expanduser()
    path = folder / file if folder.is_dir() else _cached(name_or_path, file)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); save the model's processor again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{path} holds a {kind}, expected an object; save the model's processor again")
    return content


def _cached(name: str, file: str) -> Path | None:
    if name.startswith((".", "/", "~")):
        return None  # meant as a folder
    from transformers.utils import cached_file

    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"found neither a folder nor a reachable model named {name!r} ({reason}); give the folder that "
            "save_pretrained wrote, or a name that can be fetched"
        ) from None
    return Path(path) if path is not None else None
