"""`<shard>.tar.idx`: where each sample of a shard starts, n+1 little-endian uint64 (the layout Energon uses)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of, write_atomic
from datamodules.shards.manifest import ShardEntry
from datamodules.shards.tar import CorruptShardError, members, split_key

Offsets = npt.NDArray[np.uint64]


def scan(path: Path) -> tuple[list[int], frozenset[str], list[str]]:
    """Walk a shard and verify it.

    Returns:
        n+1 byte offsets; the fields that every sample has; the keys.

    Raises:
        CorruptShardError: any damage that a tar archive can show (all but flipped data bytes, which need sha256).
    """
    size = path.stat().st_size
    if size == 0:
        raise CorruptShardError("the file is empty")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _collect(descriptor, size)
    finally:
        os.close(descriptor)


def _collect(descriptor: int, size: int) -> tuple[list[int], frozenset[str], list[str]]:
    offsets: list[int] = []
    keys: list[str] = []
    seen: set[str] = set()
    fields: set[str] = set()
    common: frozenset[str] | None = None
    end = 0
    for member in members(lambda o, n: os.pread(descriptor, n, o), 0, size, whole=True):
        split = split_key(member.name)
        if split is None:
            continue
        key, field = split
        if keys and key == keys[-1]:
            if field in fields:
                raise CorruptShardError(f"sample {key!r} has the field {field!r} twice")
        elif key in seen:
            raise CorruptShardError(f"the files of sample {key!r} do not lie side by side")
        else:
            common = frozenset(fields) & (frozenset(fields) if common is None else common) if keys else None
            fields = set()
            seen.add(key)
            keys.append(key)
            offsets.append(member.start)
        fields.add(field)
        end = member.next
    if not keys:
        raise CorruptShardError("no sample in it")
    common = frozenset(fields) if common is None else common & fields
    return [*offsets, end], common, keys


def build_index(path: Path, *, sha256: bool = True) -> ShardEntry:
    """Verify a shard and write its index beside it.

    Args:
        path: the shard.
        sha256: also take the checksum, the one thing that shows flipped data bytes.

    Returns:
        The shard's line in the manifest.

    Raises:
        CorruptShardError: the shard is damaged.
    """
    try:
        offsets, fields, _ = scan(path)
    except ValueError as error:
        raise CorruptShardError(str(error)) from error
    write_atomic(index_path(path), np.asarray(offsets, "<u8").tobytes())
    checksum = sha256_of(path) if sha256 else None
    return ShardEntry(path.name, len(offsets) - 1, path.stat().st_size, checksum, tuple(sorted(fields)))


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
