"""An experiment file with the group files that it points to, as a plain tree; no class is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qm_lightning.errors import UserError

GROUPS = ("model", "data", "trainer", "logger")


def read_experiment(path: Path) -> dict[str, Any]:
    """Read a configuration and put its group files where they are named.

    Args:
        path: e.g. ``configs/experiment/image.yaml``; its groups are paths relative to it, or trees.

    Returns:
        The tree, without the defaults of the classes.

    Raises:
        UserError: no such file, or no mapping in it.
    """
    tree = _mapping(path)
    for group in GROUPS:
        if isinstance(tree.get(group), str):
            tree[group] = _mapping(path.parent / tree[group])
    return tree


def lookup(tree: dict[str, Any], dotted: str) -> Any:
    """The value at ``a.b.c``, or ``None``."""
    value: Any = tree
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read {path} ({error}); expected a YAML configuration; check the path"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a mapping; mend the file")
    return content
