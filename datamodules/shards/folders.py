"""Which folders hold shards, and what indexing and checking them have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datamodules.errors import DataError
from datamodules.shards.manifest import MANIFEST_NAME
from datamodules.shards.remote import is_url

PACKED = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")

_MANY_BYTES = 256 << 20  # below that, starting processes takes longer than it saves


def shard_folders(place: str, *, indexed: bool = False) -> list[Path]:
    """Folders at or below a place that hold shards.

    Args:
        place: a folder.
        indexed: also those that hold a manifest alone: all their shards are gone.

    Raises:
        DataError: there is none.
    """
    if is_url(place):
        raise DataError(
            f"{place} is an address, expected a local folder: index shards before they are uploaded; downloads are "
            "compared with the manifest by themselves"
        )
    root = Path(place)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(
            f"{root} {what}, expected a folder of WebDataset shards (no *.tar under it); check the path"
        )
    patterns = ("*.tar", MANIFEST_NAME) if indexed else ("*.tar",)
    if folders := sorted({path.parent for pattern in patterns for path in root.rglob(pattern)}):
        return [folder for folder in folders if not _dealt_out(folder, folders)]
    if packed := [path for pattern in PACKED for path in root.rglob(pattern)]:
        raise DataError(
            f"found {len(packed)} compressed shards under {root}, such as {packed[0].name}, expected plain "
            "*.tar, which can be read at any place: unpack them first (gunzip or the like)"
        )
    raise DataError(f"no *.tar under {root}; expected a folder of WebDataset shards; check the path")


def _dealt_out(folder: Path, folders: Sequence[Path]) -> bool:
    """Whether other folders link to all shards of this one, as `index --split` makes them: they are checked there."""
    if (folder / MANIFEST_NAME).is_file():
        return False
    links = {link.resolve() for other in folders for link in other.glob("*.tar") if link.is_symlink()}
    shards = [path for path in folder.glob("*.tar") if not path.is_symlink()]
    return bool(shards) and all(path.resolve() in links for path in shards)


def processes_for(paths: Sequence[Path], asked: int | None) -> int:
    """How many processes to use: as asked, else all cores if there is enough to do."""
    if asked is not None:
        return asked
    many = sum(path.stat().st_size for path in paths if path.exists()) >= _MANY_BYTES
    return len(os.sched_getaffinity(0)) if many else 1


def reason_of(error: Exception) -> str:
    """Why a shard that was listed cannot be used, in one line."""
    if isinstance(error, FileNotFoundError):
        return "a link to a file that is not there"  # it was listed, so its name is there
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split())
