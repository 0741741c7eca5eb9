"""Small files that lie beside a pre-trained model, in a folder or in the Hugging Face cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.errors import DataError


@contextmanager
def network(allowed: bool) -> Iterator[None]:
    """Keep off the network unless `allowed`; `local_files_only` alone still lets transformers call home."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find_source(name_or_path: str) -> str:
    """The folder as an absolute path, or the name of a model if it cannot mean a folder.

    Raises:
        DataError: it means a folder, and there is none.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise DataError(
            f"the backbone folder {name_or_path!r} does not exist; expected one that save_pretrained wrote: "
            "check the path, or pre-train the backbone first"
        )
    return name_or_path


def read_model_json(name_or_path: str, file: str, download: bool) -> dict[str, Any] | None:
    """Read one JSON file of a model.

    Args:
        name_or_path: a folder, or a model's name on the Hugging Face hub.
        file: the file's name.
        download: fetch it if it is not in the cache.

    Returns:
        What it holds; `None` if the model has no such file.

    Raises:
        DataError: no such model within reach, or the file is not a JSON object.
    """
    source = find_source(name_or_path)
    path = Path(source, file) if Path(source).is_dir() else _cached(source, file, download)
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


def _cached(name: str, file: str, download: bool) -> Path | None:
    from transformers.utils import cached_file

    try:
        with network(download):
            path = cached_file(
                name, file, local_files_only=not download, _raise_exceptions_for_missing_entries=False
            )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"found no model {name!r} ({reason}); give the folder that save_pretrained wrote, or set "
            "download=true to fetch a model by its name"
        ) from None
    return Path(path) if path is not None else None
