"""What changed between the configuration of a checkpoint and the one that continues it."""

from __future__ import annotations

from typing import Any

# Where a run is kept and how it was continued says nothing about what it computes.
_IGNORED = {"run_dir", "ckpt_path", "fresh", "resume_policy", "name", "config", "weights_only"}
_SHOWN = 20


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names; lists stay values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def changed_settings(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One ``name: old -> new`` for every setting that differs, sorted by name."""
    old, new = (
        flatten({key: value for key, value in tree.items() if key not in _IGNORED})
        for tree in (stored, current)
    )
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names]


def describe_changes(stored: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The line printed on resume, or ``None`` if nothing changed."""
    changes = changed_settings(stored, current)
    if not changes:
        return None
    rest = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return (
        f"resume: {len(changes)} settings differ from the checkpoint's: " + ", ".join(changes[:_SHOWN]) + rest
    )
