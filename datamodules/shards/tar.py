"""Tar headers, read strictly: what `tarfile` skips in silence is an error here (spec data.md, 1)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from datamodules.errors import DataError

BLOCK = 512
# WebDataset's rule: the key ends at the first dot of the base name; names like __x__ are not samples.
_NAME = re.compile(r"^(?!__[^/]*__(?:$|/))((?:.*/|)[^./][^./]*)[.]([^/]+)$")
_NAMES = re.compile(
    r"^(?:(?!__[^/\n]*__(?:$|/))((?:.*/|)[^./\n][^./\n]*)[.]([^/\n]+)|.*)$", re.MULTILINE
)  # by line
_OCTAL = re.compile(rb"[0-7]+")
_PAX_RECORD = re.compile(rb"(\d{1,12}) ([^=]+)=")


class CorruptShardError(DataError):
    """A shard that cannot be trusted; the message says where and why."""


def split_key(name: str) -> tuple[str, str] | None:
    """Split a member's name into sample key and field (lower case); None if it belongs to no sample."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def split_keys(names: Sequence[str]) -> list[tuple[str, str]]:
    """`split_key` of many names; ("", "") for one that belongs to no sample."""
    lines = "\n".join(names)
    if not names or lines.count("\n") >= len(names):  # a name of several lines
        return [split_key(name) or ("", "") for name in names]
    return [(key, field.lower()) for key, field in _NAMES.findall(lines)]


def _size(header: bytes) -> int:
    raw = header[124:136]
    if raw[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b"\0 ")
    if digits and not _OCTAL.fullmatch(digits):
        raise ValueError("size is no octal number")
    return int(digits or b"0", 8)


def name_of(header: bytes) -> str:
    """The name in a header."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode()


def longer_name(kind: bytes, payload: bytes) -> str | None:
    """The name of the next member out of a PAX (`x`) or GNU (`L`) header; None if it says none."""
    if kind == b"L":
        return payload.rstrip(b"\0").decode()
    name, at = None, 0
    while payload[at : at + 1].strip(
        b"\0"
    ):  # records "LENGTH KEY=VALUE\n", the whole of one counted in its length
        match = _PAX_RECORD.match(payload, at)
        stop = at + int(match[1]) if match else 0
        if match is None or stop <= match.end() or payload[stop - 1 : stop] != b"\n":
            raise CorruptShardError("bad record in a PAX header")
        name, at = payload[match.end() : stop - 1].decode() if match[2] == b"path" else name, stop
    return name


def _check(header: bytes, offset: int) -> None:
    if len(header) < BLOCK:
        raise CorruptShardError(f"truncated header at byte {offset}")
    stored = header[148:156].strip(b"\0 ")
    # The checksum is a sum of bytes. So is the lower half of Adler-32, plus 1, modulo 65521, ten times as fast.
    if not _OCTAL.fullmatch(stored) or (
        zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF != (int(stored, 8) + 1) % 65521
    ):
        raise CorruptShardError(f"bad header checksum at byte {offset}")


def read_header(header: bytes, position: int, end: int) -> tuple[bytes, int, int] | None:
    """Check a header block and read it.

    Args:
        header: the block, shorter if the file ends in it.
        position: where it lies.
        end: byte after the last one that its member may take.

    Returns:
        Its member's kind (a byte) and size, and where the next header lies; None for the zeros that end an archive.

    Raises:
        CorruptShardError: it is damaged, or its member is cut.
    """
    if len(header) == BLOCK and not any(header):
        return None
    _check(header, position)
    size = _size(header)
    following = position + BLOCK + -(-size // BLOCK) * BLOCK
    if following > end:
        raise CorruptShardError(f"truncated member at byte {position}: {following - end} bytes are missing")
    return header[156:157], size, following


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
    position, long_name = 0, None
    while position < len(buffer):
        header = buffer[position : position + BLOCK]
        if (found := read_header(header, position, len(buffer))) is None:
            break
        kind, size, following = found
        content = buffer[position + BLOCK : position + BLOCK + size]
        if kind in (b"x", b"L"):
            long_name = longer_name(kind, content) or long_name
        else:
            if kind in (b"0", b"\0") and (split := split_key(long_name or name_of(header))):
                key, field = split
                fields[field] = content
            long_name = None
        position = following
    if key is None:
        raise CorruptShardError("no sample at this place")
    return key, fields
