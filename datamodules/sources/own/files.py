"""Finds files, names their samples and deals them to splits."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.sources.splits import Split

# What people call the splits' folders.
_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_folders(source: Path) -> dict[Split, Path]:
    """The splits' folders, if the source has a folder for training; else nothing."""
    found = {
        _NAMES[p.name.lower()]: p for p in sorted(source.iterdir()) if p.is_dir() and p.name.lower() in _NAMES
    }
    return found if "train" in found else {}


def split_by_name(name: str, val_share: float, test_share: float, seed: int) -> Split:
    """The split of a file by a hash of its name: it never changes, whatever files lie beside it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < val_share:
        return "val"
    return "test" if place < val_share + test_share else "train"


def check_shares(val_share: float, test_share: float) -> None:
    """Refuse shares that leave nothing to train on.

    Raises:
        DataError: they are negative, or sum to 1 or more.
    """
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise DataError(
            f"val_share is {val_share} and test_share {test_share}, expected shares >= 0 that sum to less than 1"
        )


def named_split(name: str) -> Split | None:
    """The split that a table's entry means, `None` if it means none."""
    return _NAMES.get(name.strip().lower())


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files with one of the suffixes (lower case, with dot), sorted; hidden files and folders are left out."""
    wanted = frozenset(suffixes)
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in wanted
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def say_left_aside(source: Path, suffixes: Iterable[str]) -> None:
    """Print how many files below the source nobody reads, by their endings: pictures of a phone may be among them.

    Args:
        source: a folder; of a single file there is nothing to say.
        suffixes: endings that are read, with dot.
    """
    read = frozenset(suffixes)
    paths = (p for p in source.rglob("*") if not any(s.startswith(".") for s in p.relative_to(source).parts))
    left = Counter(p.suffix.lower() for p in paths if p.suffix.lower() not in read and p.is_file())
    if left:
        ranked = sorted(left.items(), key=lambda pair: (-pair[1], not pair[0], pair[0]))
        kinds = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in ranked)
        print(f"{left.total()} files left aside, their endings are not read: {kinds}")


def stamp(path: Path) -> list[int]:
    """Size and time of the last change: a file with the same stamp need not be checked again."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def give_keys(samples: list[dict[str, Any]]) -> None:
    """Set each sample's ``key`` from its ``name``: unique, and without a dot in its base name.

    Args:
        samples: with ``name``, a path with `/`; changed in place.
    """
    used: set[str] = set()
    for sample in samples:
        folder, _, base = sample["name"].rpartition("/")
        folder, base = (re.sub("[\ud800-\udfff\x00-\x1f]", "_", part) for part in (folder, base))
        stem = base.replace(".", "_").strip() or "_"
        if folder.startswith("__") or stem.startswith("__"):  # WebDataset takes such names for no samples
            stem, folder = stem.lstrip("_") or "0", folder.lstrip("_")
        key = wanted = f"{folder}/{stem}" if folder else stem
        number = 2
        while key in used:
            key, number = f"{wanted}-{number}", number + 1
        used.add(key)
        sample["key"] = key
