"""`<shard>.tar.idx`: where each sample of a shard starts, n+1 little-endian uint64 (the layout Energon uses)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules.errors import DataError
from datamodules.shards.files import write_atomic
from datamodules.shards.manifest import ShardEntry
from datamodules.shards.scan import Scan, scan
from datamodules.shards.tar import CorruptShardError

Offsets = npt.NDArray[np.uint64]


def build_index(path: Path, found: Scan | None = None, *, fields: Iterable[str] = ()) -> ShardEntry:
    """Verify a shard and write its index beside it.

    Args:
        path: the shard.
        found: what `scan` found in it with its checksum, if that was done already.
        fields: fields that every sample must have.

    Returns:
        The shard's line in the manifest, with its checksum: the one thing that shows flipped data bytes.

    Raises:
        CorruptShardError: the shard is damaged, or a sample lacks a field.
    """
    found = found or scan(path, checksum=True)
    if missing := found.missing(fields):
        raise CorruptShardError("; ".join(missing))
    write_index(path, found)
    return entry_of(path, found)


def write_index(path: Path, found: Scan) -> None:
    """Write a shard's index beside it, atomically."""
    write_atomic(index_path(path), np.asarray(found.offsets, "<u8").tobytes())


def entry_of(path: Path, found: Scan) -> ShardEntry:
    """A shard's line in the manifest."""
    return ShardEntry(path.name, len(found.keys), path.stat().st_size, found.sha256, found.fields)


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".idx")


def load_offsets(path: Path) -> Offsets:
    """Map an index file into memory.

    Args:
        path: the `.idx` file.

    Returns:
        uint64 [n+1]; sample i is bytes [offset_i, offset_{i+1}) of the shard.

    Raises:
        DataError: the file is missing or is no index.
    """
    if not path.is_file():
        raise DataError(
            f"the index {path} is missing; make it with: python -m datamodules index {path.parent}"
        )
    size = path.stat().st_size
    if size < 16 or size % 8:
        raise DataError(
            f"{path} is no index ({size} bytes, expected a multiple of 8); "
            f"make it anew with: python -m datamodules index {path.parent}"
        )
    return np.memmap(path, "<u8", mode="r")
