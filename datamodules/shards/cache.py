"""Shards of a URL on this machine: fetched once for all processes, checked, and evicted when room is needed."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of
from datamodules.shards.manifest import Manifest
from datamodules.shards.remote import Remote

log = logging.getLogger(__name__)

_PART = ".part"
_LOCK = ".lock"


class CachedFile(NamedTuple):
    """What a file must be, and what it is called in the cache.

    Attributes:
        bytes: its size.
        sha256: its checksum, if known.
        local: name in the cache; follows from the shard's contents, so a rewritten shard is another file.
    """

    bytes: int
    sha256: str | None
    local: str


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/qm-lightning/shards`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qm-lightning" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Gives local paths of remote files. Picklable; any number of processes may share its folder.

    A file is fetched under a lock of its own, into a temporary file that is renamed when size and checksum are
    right. What was not used for longest is evicted when the limit or the disk asks for room; a process that
    has such a file open can read on.

    Attributes:
        remote: where the files are.
        root: folder of the cache, for all data sets together.
        files: by name, what each must be.
        limit: bytes that the folder may hold; `None`: as the disk allows.
    """

    remote: Remote
    root: Path
    files: Mapping[str, CachedFile]
    limit: int | None = None

    @classmethod
    def of(cls, remote: Remote, manifest: Manifest, root: str | Path | None, limit: int | None) -> ShardCache:
        """The cache for a split."""
        files = {}
        for shard in manifest.shards:
            tag = shard.sha256[:16] if shard.sha256 else str(shard.bytes)
            files[shard.name] = CachedFile(shard.bytes, shard.sha256, f"{tag}-{shard.name}")
            index = f"{shard.name}.idx"
            files[index] = CachedFile(8 * (shard.samples + 1), None, f"{tag}-{index}")
        return cls(remote, Path(root) if root else default_cache(), files, limit)

    @property
    def folder(self) -> Path:
        """Where this data set's files are."""
        return self.root / hashlib.sha256(self.remote.root.encode()).hexdigest()[:16]

    def __call__(self, name: str) -> Path:
        """Local path of a file, which is fetched first if it is not there.

        Raises:
            DataError: it cannot be fetched, or is not what the manifest says.
            OSError: the cache cannot be written.
        """
        file = self.files[name]
        path = self.folder / file.local
        if _is_there(path, file.bytes):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + _LOCK)):
            if not _is_there(path, file.bytes):
                self._fetch(name, file, path)
        return path

    def _fetch(self, name: str, file: CachedFile, path: Path) -> None:
        part = path.with_name(path.name + _PART)
        self._reserve(part, file.bytes)
        try:
            try:
                self.remote.download(name, file.bytes, part)
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.remote.root}/{name} is missing, the manifest there lists it; upload it again"
                ) from error
            if file.sha256 and (found := sha256_of(part)) != file.sha256:
                raise DataError(
                    f"{self.remote.root}/{name} has the checksum {found[:16]}, the manifest says {file.sha256[:16]}; "
                    "it was changed or damaged: upload it again, or index the shards again"
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Make room and take it at once, so that processes that fetch side by side count each other."""
        if self.limit is not None and size > self.limit:
            raise DataError(f"a shard has {size} bytes, but cache_bytes is {self.limit}; allow more")
        with _locked(self.root / _LOCK):
            part.unlink(missing_ok=True)  # of a process that was killed; its lock is ours now
            self._evict(size)
            with part.open("wb") as file:
                file.truncate(size)

    def _evict(self, size: int) -> None:
        files = [(path, path.stat()) for path in self.root.glob("*/*") if path.suffix != _LOCK]
        used = sum(stat.st_size for _, stat in files)
        excess = used + size - self.limit if self.limit is not None else 0
        excess = max(excess, size - shutil.disk_usage(self.root).free)
        for path, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
            if excess <= 0:
                return
            if path.suffix != _PART:
                path.unlink(missing_ok=True)
                excess -= stat.st_size
        if excess > 0:
            log.warning("%s is over its limit by %d bytes until downloads end", self.root, excess)


def _is_there(path: Path, size: int) -> bool:
    """Whether a file is in the cache; if so, it counts as used now."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads; the system frees it when its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
