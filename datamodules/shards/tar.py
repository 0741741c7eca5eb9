"""Walks tar headers by byte offset, strictly: what `tarfile` skips in silence is an error here (spec data.md, 1)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from datamodules.errors import DataError

BLOCK = 512
# WebDataset's rule: the key ends at the first dot of the base name; names like __x__ are not samples.
_NAME = re.compile(r"^(?!__[^/]*__(?:$|/))((?:.*/|)[^./][^./]*)[.]([^/]+)$")
_OCTAL = re.compile(rb"[0-7]+")
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")

Read = Callable[[int, int], bytes]


class CorruptShardError(DataError):
    """A shard that cannot be trusted; the message says where and why."""


class Member(NamedTuple):
    """One regular file of a tar archive; offsets in bytes."""

    start: int
    next: int
    name: str
    data: int
    size: int


def split_key(name: str) -> tuple[str, str] | None:
    """Split a member's name into sample key and field (lower case); None if it belongs to no sample."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def _size(header: bytes) -> int:
    raw = header[124:136]
    if raw[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b"\0 ")
    if digits and not _OCTAL.fullmatch(digits):
        raise ValueError("size is no octal number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode()


def _check(header: bytes, offset: int) -> None:
    if len(header) < BLOCK:
        raise CorruptShardError(f"truncated header at byte {offset}")
    stored = header[148:156].strip(b"\0 ")
    # The checksum is a sum of bytes. So is the lower half of Adler-32, plus 1, modulo 65521, ten times as fast.
    if not _OCTAL.fullmatch(stored) or (
        zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF != (int(stored, 8) + 1) % 65521
    ):
        raise CorruptShardError(f"bad header checksum at byte {offset}")


def members(read: Read, start: int, end: int, *, whole: bool) -> Iterator[Member]:
    """Walk the regular files in the bytes [start, end) of an archive.

    Args:
        read: (offset, size) -> bytes.
        start: first byte, of a header.
        end: byte after the last.
        whole: the range is a whole archive: demand an end marker with only zeros behind it.

    Raises:
        CorruptShardError: damage, with its place.
    """
    position, first, long_name = start, start, None
    while position < end:
        header = read(position, BLOCK)
        if len(header) == BLOCK and not any(header):
            if whole and any(any(read(o, 1 << 20)) for o in range(position, end, 1 << 20)):
                raise CorruptShardError(f"data after the end-of-archive marker at byte {position}")
            return
        _check(header, position)
        size, kind = _size(header), header[156:157]
        following = position + BLOCK + -(-size // BLOCK) * BLOCK
        if following > end:
            raise CorruptShardError(
                f"truncated member at byte {position}: {following - end} bytes are missing"
            )
        if kind == b"x":
            match = _PAX_PATH.search(read(position + BLOCK, size))
            long_name = match[1].decode() if match else long_name
        elif kind == b"L":
            long_name = read(position + BLOCK, size).rstrip(b"\0").decode()
        else:
            if kind in (b"0", b"\0"):
                yield Member(first, following, long_name or _name(header), position + BLOCK, size)
            first, long_name = following, None
        position = following
    if whole:
        raise CorruptShardError("no end-of-archive marker: the file was cut")


def parse_sample(buffer: bytes) -> tuple[str, dict[str, bytes]]:
    """Take the fields out of one sample's bytes.

    Args:
        buffer: bytes [offset_i, offset_{i+1}) of a shard.

    Returns:
        The sample's key, and its fields by lower-case extension.

    Raises:
        CorruptShardError: the bytes hold no sample, or a damaged one.
    """
    key, fields = None, {}
    for member in members(lambda o, n: buffer[o : o + n], 0, len(buffer), whole=False):
        split = split_key(member.name)
        if split is not None:
            key = split[0]
            fields[split[1]] = bytes(buffer[member.data : member.data + member.size])
    if key is None:
        raise CorruptShardError("no sample at this place")
    return key, fields
