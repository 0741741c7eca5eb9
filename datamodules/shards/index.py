"""`<shard>.tar.idx`: where each sample of a shard starts, n+1 little-endian uint64 (the layout Energon uses)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of, write_atomic
from datamodules.shards.manifest import ShardEntry
from datamodules.shards.tar import CorruptShardError, members, split_key

Offsets = npt.NDArray[np.uint64]


class Scan(NamedTuple):
    """What a walk over a shard found.

    Attributes:
        offsets: n+1 byte offsets.
        keys: of the samples.
        layouts: each set of fields that occurs, with the number of its samples and the first one's key.
    """

    offsets: list[int]
    keys: list[str]
    layouts: dict[frozenset[str], tuple[int, str]]

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every sample has."""
        return tuple(sorted(frozenset.intersection(*self.layouts)))

    def missing(self, fields: Iterable[str]) -> list[str]:
        """For each field that some sample lacks: how many lack it, and one that does."""
        out = []
        for field in sorted(fields):
            without = [entry for layout, entry in self.layouts.items() if field not in layout]
            if without:
                count = sum(n for n, _ in without)
                out.append(f"{count} of {len(self.keys)} samples lack {field!r}, first {without[0][1]!r}")
        return out


def scan(path: Path) -> Scan:
    """Walk a shard and verify it.

    Raises:
        CorruptShardError: any damage that a tar archive can show (all but flipped data bytes, which need sha256).
    """
    size = path.stat().st_size
    if size == 0:
        raise CorruptShardError("the file is empty")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _collect(descriptor, size)
    except ValueError as error:  # a name or a number that is none
        raise CorruptShardError(str(error)) from error
    finally:
        os.close(descriptor)


def _collect(descriptor: int, size: int) -> Scan:
    found = Scan([], [], {})
    seen: set[str] = set()
    fields: set[str] = set()
    end = 0
    for member in members(lambda o, n: os.pread(descriptor, n, o), 0, size, whole=True):
        split = split_key(member.name)
        if split is None:
            continue
        key, field = split
        if found.keys and key == found.keys[-1]:
            if field in fields:
                raise CorruptShardError(f"sample {key!r} has the field {field!r} twice")
        elif key in seen:
            raise CorruptShardError(f"the files of sample {key!r} do not lie side by side")
        else:
            _count(found, fields)
            fields = set()
            seen.add(key)
            found.keys.append(key)
            found.offsets.append(member.start)
        fields.add(field)
        end = member.next
    if not found.keys:
        raise CorruptShardError("no sample in it")
    _count(found, fields)
    found.offsets.append(end)
    return found


def _count(found: Scan, fields: set[str]) -> None:
    if fields:
        count, first = found.layouts.get(frozenset(fields), (0, found.keys[-1]))
        found.layouts[frozenset(fields)] = (count + 1, first)


def build_index(path: Path, found: Scan | None = None, *, fields: Iterable[str] = ()) -> ShardEntry:
    """Verify a shard and write its index beside it.

    Args:
        path: the shard.
        found: what `scan` found in it, if that was done already.
        fields: fields that every sample must have.

    Returns:
        The shard's line in the manifest, with its checksum: the one thing that shows flipped data bytes.

    Raises:
        CorruptShardError: the shard is damaged, or a sample lacks a field.
    """
    found = found or scan(path)
    if missing := found.missing(fields):
        raise CorruptShardError("; ".join(missing))
    write_index(path, found)
    return entry_of(path, found, sha256_of(path))


def write_index(path: Path, found: Scan) -> None:
    """Write a shard's index beside it, atomically."""
    write_atomic(index_path(path), np.asarray(found.offsets, "<u8").tobytes())


def entry_of(path: Path, found: Scan, sha256: str) -> ShardEntry:
    """A shard's line in the manifest."""
    return ShardEntry(path.name, len(found.keys), path.stat().st_size, sha256, found.fields)


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
