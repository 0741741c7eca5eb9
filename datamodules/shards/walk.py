"""Walks whole archives at the speed of their checksum: headers are found one by one and checked many at a time.

`datamodules.shards.tar` says what a header must be. What is not plainly so here is read by its functions, so that
every message of damage has one source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.shards.tar import BLOCK, CorruptShardError, longer_name, name_of, read_header
from datamodules.shards.windows import Block, Windows

Bytes = npt.NDArray[np.uint8]

_FAR = 64 << 10  # bytes from header to header beyond which they are read one by one
_FEW = 8  # plain headers in a row
_ODD_STEPS = 256  # headers to read one by one where few are plain or near, before looking at a block again
_SPECIAL = b"12346S"  # hard and symbolic links, devices, pipes, sparse files
_EIGHTS = 8 ** np.arange(5, -1, -1, dtype=np.uint32)


class Members(NamedTuple):
    """Regular files in file order.

    Attributes:
        starts: where the first header of each begins.
        nexts: where the header after it begins.
        names: as stored.
        links: names of links and other special files, which hold no bytes of their own.
    """

    starts: list[int]
    nexts: list[int]
    names: list[str]
    links: list[str]


class _Place:
    """Where a walk is.

    Attributes:
        position: the next header.
        first: where the next member begins: at that header, or at the long name before it.
        long_name: of the next member.
    """

    def __init__(self) -> None:
        self.position, self.first = 0, 0
        self.long_name: str | None = None

    def take(self, into: Members, kind: bytes, following: int, name: str, payload: bytes) -> None:
        """Go on behind a header; `payload` is that of a long name."""
        if kind in (b"x", b"L"):
            self.long_name = longer_name(kind, payload) or self.long_name
        else:
            if kind in (b"0", b"\0"):
                into.starts.append(self.first)
                into.nexts.append(following)
                into.names.append(self.long_name or name)
            elif kind in _SPECIAL:
                into.links.append(self.long_name or name)
            self.first, self.long_name = following, None
        self.position = following


def walk(windows: Windows, size: int) -> Iterator[Members]:
    """All regular files of an archive, a block's at a time.

    Args:
        windows: the file.
        size: of the file.

    Raises:
        CorruptShardError: any damage that a tar archive can show, with its place, after the files before it.
    """
    place, odd = _Place(), 0
    while place.position < size:
        block, before = windows.holding(place.position, whole=not odd), place.position
        found = Members([], [], [], [])
        if not odd and before < block.stop:
            plain = _plain(place, block, size, found, windows)
            yield found
            odd = 0 if plain >= _FEW and place.position - before < _FAR * plain else _ODD_STEPS
            if place.position >= block.stop:
                continue
        odd = max(0, odd - 1)
        found = Members([], [], [], [])
        raw = windows.read(place.position, BLOCK)
        if (header := read_header(raw, place.position, size)) is None:
            _check_end(windows, place.position, size)
            return
        kind, length, following = header
        payload = windows.read(place.position + BLOCK, length) if kind in (b"x", b"L") else b""
        name = name_of(raw) if kind in (b"0", b"\0") or kind in _SPECIAL else ""
        place.take(found, kind, following, name, payload)
        yield found
    raise CorruptShardError("no end-of-archive marker: the file was cut")


def _check_end(windows: Windows, position: int, size: int) -> None:
    step = 1 << 20
    if any(any(windows.read(offset, step)) for offset in range(position, size, step)):
        raise CorruptShardError(f"data after the end-of-archive marker at byte {position}")


def _plain(place: _Place, block: Block, end: int, found: Members, windows: Windows) -> int:
    """Take the headers of a block that are plainly good, up to the first that is not; how many."""
    positions = _chain(block, place.position - block.start, end - block.start)
    headers = np.frombuffer(block.data, np.uint8, block.size // BLOCK * BLOCK).reshape(-1, BLOCK)[
        np.asarray(positions[:-1], np.int64) // BLOCK
    ]
    good = _checked(headers)
    count = len(good) if good.all() else int(np.argmin(good))
    if not count:
        return 0
    try:
        names, kinds = _names(headers[:count]), headers[:count, 156]
    except UnicodeDecodeError:  # harmless in the name of a folder
        return 0
    nexts = (np.asarray(positions[1 : count + 1], np.int64) + block.start).tolist()
    if place.first == place.position and ((kinds == 0) | (kinds == ord("0"))).all():
        found.starts.extend([place.position, *nexts[:-1]])
        found.nexts.extend(nexts)
        found.names.extend(names)
        place.position = place.first = nexts[-1]
        return count
    for i, kind in enumerate(kinds.tobytes()):
        long = kind in b"xL"
        size = int(headers[i, 124:135].tobytes(), 8) if long else 0
        payload = windows.read(place.position + BLOCK, size) if long else b""
        place.take(found, bytes([kind]), nexts[i], names[i], payload)
    return count


def _chain(block: Block, offset: int, end: int) -> list[int]:
    """Offsets of headers in a block, each found by the size in the one before, and where the last one leads to."""
    data, last = block.data, block.size - BLOCK
    offsets = [offset]
    try:
        while offset <= last:
            size = int(data[offset + 124 : offset + 135], 8)
            offset += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
            if size < 0 or offset > end:
                break
            offsets.append(offset)
    except ValueError:  # no plain number: for `read_header` to judge
        pass
    return offsets


def _checked(headers: Bytes) -> npt.NDArray[np.bool_]:
    """Which headers [n, 512] have a plain octal size and the right checksum in its usual form."""
    octal = (headers[:, 124:135] & 0xF8 == 0x30).all(1) & (headers[:, 148:154] & 0xF8 == 0x30).all(1)
    ended = ((headers[:, [135, 154, 155]] & 0xDF) == 0).all(1)  # zero or space
    field = headers[:, 148:156]
    total = headers.sum(1, dtype=np.uint32) - field.sum(1, dtype=np.uint32) + 8 * ord(" ")
    right: npt.NDArray[np.bool_] = octal & ended & (total == (field[:, :6] & 7) @ _EIGHTS)
    return right


def _names(headers: Bytes) -> list[str]:
    raw = np.ascontiguousarray(headers[:, :100]).view("S100").ravel().tolist()
    if headers[:, 345].any() or b"\0" in b"".join(raw):
        return [name_of(header.tobytes()) for header in headers]
    return [name.decode() for name in raw]
