"""Blocks of a file, each read once and hashed in a thread while the caller works on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

WINDOW = 4 << 20  # bytes: about what a processor's cache holds, and milliseconds of hashing


class Block(NamedTuple):
    """Consecutive bytes of a file.

    Attributes:
        start: where they begin.
        data: they, and perhaps what an earlier block left behind them.
        size: how many they are.
    """

    start: int
    data: bytearray
    size: int

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + self.size


class Windows:
    """A file, block by block.

    With a checksum every byte is read, once: hashing releases the interpreter's lock, so the caller's work on a block
    and the next block's reading cost no time beside it. Without one, what nobody asks for is not read.

    Args:
        descriptor: of the file, open for reading.
        size: of the file.
        checksum: take the sha256 of the whole file.
    """

    def __init__(self, descriptor: int, size: int, *, checksum: bool) -> None:
        self._descriptor, self._size = descriptor, size
        self._digest = hashlib.sha256() if checksum else None
        two = checksum and size > WINDOW
        self._buffers = [bytearray(min(WINDOW, size)) for _ in range(2 if two else 1)]
        self._pool = ThreadPoolExecutor(1) if two else None
        self._hashing: Future[None] | None = None
        self._block = Block(0, self._buffers[0], 0)
        self._upcoming = self._fill(0) if checksum else self._block

    def __enter__(self) -> Windows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def holding(self, position: int, *, whole: bool = True) -> Block:
        """The block that a position lies in, valid until the next call.

        Args:
            position: never less than in a former call.
            whole: False = do not read a block for it if no checksum wants one.

        Returns:
            A block; one that the position is not in, at the file's end or without `whole`.
        """
        if self._digest is not None:
            while position >= self._block.stop and self._advance(self._digest.update):
                pass
        elif whole and not self._block.start <= position < self._block.stop:
            self._block = self._fill(position)
        return self._block

    def read(self, offset: int, size: int) -> bytes:
        """Any bytes; fewer at the end of the file."""
        begin = offset - self._block.start
        if begin >= 0 and begin + size <= self._block.size:
            return bytes(self._block.data[begin : begin + size])
        return os.pread(self._descriptor, size, offset)

    def sha256(self) -> str | None:
        """The file's checksum, if it was asked for; reads what is left."""
        if self._digest is None:
            return None
        while self._advance(self._digest.update):
            pass
        return self._digest.hexdigest()

    def _advance(self, update: Callable[[memoryview], None]) -> bool:
        """Step on to the block that lies ready, hash it, and read the one behind it; False at the end."""
        if self._hashing is not None:
            self._hashing.result()  # of the present block, whose buffer is filled anew below
            self._hashing = None
        self._block = self._upcoming
        if not self._block.size:
            return False
        content = memoryview(self._block.data)[: self._block.size]
        if self._pool is None:
            update(content)
            self._upcoming = self._block._replace(start=self._block.stop, size=0)
        else:
            self._hashing = self._pool.submit(update, content)
            self._buffers.reverse()
            self._upcoming = self._fill(self._block.stop)
        return True

    def _fill(self, offset: int) -> Block:
        """Read into the first buffer until it is full, or the file at its end."""
        buffer = self._buffers[0]
        target = memoryview(buffer)[: max(0, self._size - offset)]
        got = 0
        while got < len(target) and (more := os.preadv(self._descriptor, [target[got:]], offset + got)):
            got += more
        return Block(offset, buffer, got)
