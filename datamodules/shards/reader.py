"""Reads samples out of tar shards by byte offset: no tar walk, no state, any order."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.hashing import Int
from datamodules.shards.index import Offsets, load_offsets
from datamodules.shards.tar import parse_sample

MAX_OPEN = 64  # descriptors of one reader; batches rarely touch more shards
MAX_OPEN_CACHED = 4  # of shards in a cache, where an open file that was evicted still takes its space
INDEX_BYTES = 64 << 20  # indexes kept in memory, copied: a mapped one would hold a descriptor
MAX_RUN = 8 << 20  # bytes that one read may fetch
VANISHED = 3  # times that a cache may evict a file between fetching and opening it
RETRIES = (0.05, 0.3, 1.5)  # seconds before another try after an I/O error

Sample = tuple[str, dict[str, bytes]]
T = TypeVar("T")


class ShardFile(NamedTuple):
    """What the reader must know of a shard."""

    name: str
    samples: int
    bytes: int


class _Run(NamedTuple):
    """Neighbouring samples that one read fetches; `members` are (slot in the answer, start, end)."""

    shard: int
    start: int
    end: int
    members: list[tuple[int, int, int]]


class SampleReader:
    """Reads samples of a set of shards, merging those that lie side by side.

    Not thread-safe; each worker process has its own.

    Args:
        shards: the shards, in the order that shard numbers refer to.
        locate: gives the local path of a file by its name; a shard's index is `<name>.idx`.
        max_open: descriptors that are kept open.
    """

    def __init__(
        self, shards: Sequence[ShardFile], locate: Callable[[str], Path], max_open: int = MAX_OPEN
    ) -> None:
        self._shards, self._locate, self._max_open = shards, locate, max_open
        self._files: OrderedDict[int, int] = OrderedDict()
        self._offsets: OrderedDict[int, Offsets] = OrderedDict()
        self._offset_bytes = 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; reading on opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def lengths(self, shard: Int, sample: Int) -> Int:
        """Stored bytes of samples, from the index alone.

        Args:
            shard: int64 [n].
            sample: int64 [n], number in the shard.

        Returns:
            int64 [n].

        Raises:
            DataError: an index is missing or does not fit the manifest.
        """
        out = np.empty(len(shard), np.int64)
        for s in np.unique(shard):
            at = shard == s
            offsets = self._index(int(s))
            out[at] = (offsets[sample[at] + 1] - offsets[sample[at]]).astype(np.int64)
        return out

    def read(self, shard: Int, sample: Int) -> list[Sample | Exception]:
        """Read samples; one that fails does not harm the others.

        Args:
            shard: int64 [n].
            sample: int64 [n], number in the shard.

        Returns:
            For each one (key, {field: bytes}), or the `DataError` or `OSError` that stands in its way.
        """
        out: list[Sample | Exception] = [DataError("not read")] * len(shard)
        spans: list[tuple[int, int, int, int]] = []
        for slot, (s, k) in enumerate(zip(shard.tolist(), sample.tolist(), strict=True)):
            try:
                offsets = self._index(s)
                spans.append((s, int(offsets[k]), int(offsets[k + 1]), slot))
            except (DataError, OSError) as error:
                out[slot] = error
        for run in _merge(spans):
            try:
                data = self._fetch(run.shard, run.start, run.end)
            except (DataError, OSError) as error:
                for slot, _, _ in run.members:
                    out[slot] = error
                continue
            for slot, start, end in run.members:
                try:
                    out[slot] = parse_sample(data[start - run.start : end - run.start])
                except (DataError, ValueError) as error:  # ValueError: a header that is no text or number
                    out[slot] = error
        return out

    def _index(self, shard: int) -> Offsets:
        if (offsets := self._offsets.get(shard)) is None:
            info = self._shards[shard]
            offsets = self._reach(info.name + ".idx", lambda path: np.array(load_offsets(path)))
            if len(offsets) != info.samples + 1:
                raise DataError(
                    f"{info.name}.idx holds {len(offsets) - 1} samples, the manifest says {info.samples}; "
                    "run `python -m datamodules index` on the directory again"
                )
            self._offset_bytes += offsets.nbytes
            while self._offsets and self._offset_bytes > INDEX_BYTES:
                self._offset_bytes -= self._offsets.popitem(last=False)[1].nbytes
            self._offsets[shard] = offsets
        else:
            self._offsets.move_to_end(shard)
        return offsets

    def _fetch(self, shard: int, start: int, end: int) -> bytes:
        for pause in (*RETRIES, None):
            try:
                data = os.pread(self._open(shard), end - start, start)
                while 0 < len(data) < end - start:  # the kernel may give less than asked, above 2 GiB for one
                    more = os.pread(self._open(shard), end - start - len(data), start + len(data))
                    if not more:
                        break
                    data += more
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if pause is None:
                    raise
                self.close()  # a stale handle is a common cause
                time.sleep(pause)
                continue
            if len(data) != end - start:
                raise DataError(
                    f"{self._shards[shard].name} ends at byte {start + len(data)}, its index asks for {end}; "
                    "restore the shard or index it again"
                )
            return data
        raise AssertionError("unreachable")

    def _open(self, shard: int) -> int:
        if (handle := self._files.get(shard)) is not None:
            self._files.move_to_end(shard)
            return handle
        while len(self._files) >= self._max_open:
            os.close(self._files.popitem(last=False)[1])
        info = self._shards[shard]
        handle = self._reach(info.name, lambda path: os.open(path, os.O_RDONLY))
        if (size := os.fstat(handle).st_size) != info.bytes:
            os.close(handle)
            raise DataError(
                f"{info.name} has {size} bytes, the manifest says {info.bytes}; restore it or index it again"
            )
        self._files[shard] = handle
        return handle

    def _reach(self, name: str, use: Callable[[Path], T]) -> T:
        """Use a file; one that a cache evicts at this very moment is fetched again."""
        for left in reversed(range(VANISHED)):
            path = self._locate(name)
            try:
                return use(path)
            except (FileNotFoundError, DataError):
                if not left or path.is_file():
                    raise
        raise AssertionError("unreachable")


def _merge(spans: list[tuple[int, int, int, int]]) -> Iterator[_Run]:
    """Join spans (shard, start, end, slot) that touch, in file order."""
    run: _Run | None = None
    for shard, start, end, slot in sorted(spans):
        touches = run is not None and shard == run.shard and start <= run.end and end - run.start <= MAX_RUN
        if run is not None and touches:
            run.members.append((slot, start, end))
            run = run._replace(end=max(end, run.end))
            continue
        if run is not None:
            yield run
        run = _Run(shard, start, end, [(slot, start, end)])
    if run is not None:
        yield run
