"""Files that are either complete or not there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, rename."""
    staging = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        sync_directory(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
