"""What a shard holds: its samples by key and place, after every check that a tar archive allows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datamodules.shards.tar import CorruptShardError, split_key, split_keys
from datamodules.shards.walk import Members, walk
from datamodules.shards.windows import Windows


class Scan(NamedTuple):
    """What a walk over a shard found.

    Attributes:
        offsets: n+1 byte offsets.
        keys: of the samples.
        layouts: each set of fields that occurs, with the number of its samples and the first one's key.
        sha256: of the file, if it was asked for.
        links: members named like a sample's that hold no bytes of their own: hard and symbolic links, devices.
    """

    offsets: list[int]
    keys: list[str]
    layouts: dict[frozenset[str], tuple[int, str]]
    sha256: str | None
    links: tuple[str, ...] = ()

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


def scan(path: Path, *, checksum: bool = False) -> Scan:
    """Walk a shard and verify it.

    Args:
        path: the shard.
        checksum: take its sha256 on the way, in a thread.

    Raises:
        CorruptShardError: any damage that a tar archive can show (all but flipped data bytes, which need sha256).
    """
    size = path.stat().st_size
    if size == 0:
        raise CorruptShardError("the file is empty")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with Windows(descriptor, size, checksum=checksum) as windows:
            samples = _Samples()
            links: list[str] = []
            for members in walk(windows, size):
                samples.add(members)
                links += [name for name in members.links if split_key(name)]
            return samples.found(windows.sha256())._replace(links=tuple(links))
    except CorruptShardError as error:
        if str(error).endswith(" at byte 0") and (kind := _other_format(os.pread(descriptor, 64, 0))):
            raise CorruptShardError(f"{error}: it is {kind}, expected a tar archive") from error
        raise
    except ValueError as error:  # a name or a number that is none
        raise CorruptShardError(str(error)) from error
    finally:
        os.close(descriptor)


def _other_format(head: bytes) -> str | None:
    """What a file is that has no tar header, by its first bytes."""
    known = {
        b"\x1f\x8b": "compressed with gzip, unpack it",
        b"\x28\xb5\x2f\xfd": "compressed with zstd, unpack it",
        b"BZh": "compressed with bzip2, unpack it",
        b"\xfd7zXZ": "compressed with xz, unpack it",
        b"PK\x03\x04": "a zip archive",
        b"<": "a web page, as a failed download leaves it",
        b"version https://git-lfs": "a Git LFS pointer, fetch the file with git lfs pull",
    }
    return next((kind for magic, kind in known.items() if head.lstrip().startswith(magic)), None)


class _Samples:
    """Groups files to samples: neighbours with the same key."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._keys: list[str] = []
        self._seen: set[str] = set()
        self._fields: tuple[str, ...] = ()  # of the last sample, in the order of its files
        self._counts: dict[tuple[str, ...], int] = {}
        self._first: dict[tuple[str, ...], str] = {}
        self._end = 0

    def add(self, members: Members) -> None:
        """Take further files.

        Raises:
            CorruptShardError: a sample's files do not lie side by side, or two of them are the same field.
        """
        seen, fields, end = self._seen, self._fields, self._end
        last = self._keys[-1] if self._keys else None
        split = split_keys(members.names)
        for (key, field), start, following in zip(split, members.starts, members.nexts, strict=True):
            if not field:
                continue
            end = following
            if key == last:
                if field in fields:
                    raise CorruptShardError(f"sample {key!r} has the field {field!r} twice")
                fields = (*fields, field)
                continue
            if key in seen:
                raise CorruptShardError(f"the files of sample {key!r} do not lie side by side")
            if last is not None:
                self._count(last, fields)
            last, fields = key, (field,)
            seen.add(key)
            self._keys.append(key)
            self._offsets.append(start)
        self._fields, self._end = fields, end

    def _count(self, key: str, fields: tuple[str, ...]) -> None:
        if fields in self._counts:
            self._counts[fields] += 1
        else:
            self._counts[fields], self._first[fields] = 1, key

    def found(self, sha256: str | None) -> Scan:
        """Everything that was added.

        Raises:
            CorruptShardError: no sample was.
        """
        if not self._keys:
            raise CorruptShardError("no sample in it")
        self._count(self._keys[-1], self._fields)
        layouts: dict[frozenset[str], tuple[int, str]] = {}
        for fields, count in self._counts.items():  # the same ones may come in several orders
            before, first = layouts.get(frozenset(fields), (0, self._first[fields]))
            layouts[frozenset(fields)] = (before + count, first)
        return Scan([*self._offsets, self._end], self._keys, layouts, sha256)
