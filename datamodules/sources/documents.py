"""A corpus: documents split into train, val and test as whole files, read when needed."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from datamodules.sources.splits import Split

# What makes up the same corpus on every machine: slim installations lack the tests, 3.12 lacks distutils and
# lib2to3 goes in 3.13; pydoc_data and encodings are tables.
_TESTS = ("test", "tests", "idle_test")
_TABLES = ("pydoc_data", "encodings")
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "distutils", "lib2to3", *_TESTS, *_TABLES)
)
_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.80), ("val", 0.05), ("test", 0.15))
_SHORTEST = 512  # bytes; shorter files are mostly imports of others


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        name: path below the corpus, with `/`.
        path: the file.
        size: bytes.
    """

    name: str
    path: Path
    size: int

    @property
    def package(self) -> str:
        """First part of the name, without `.py`: `asyncio` of `asyncio/events.py`, `ast` of `ast.py`."""
        return self.name.split("/")[0].removesuffix(".py")

    def read(self) -> bytes:
        """The file's bytes."""
        return _read(self.path)


@lru_cache(maxsize=1024)
def _read(path: Path) -> bytes:
    return path.read_bytes()


def split_of(name: str) -> Split:
    """The split of a file, by a hash of its name alone: it never changes, whatever files lie beside it."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    for split, size in _SHARES:
        if share < size:
            return split
        share -= size
    return _SHARES[-1][0]


@cache
def stdlib_documents(split: Split) -> tuple[Document, ...]:
    """The Python standard library's own source files of one split, sorted by name; ASCII ones only."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        if _LEFT_OUT.isdisjoint(parts) and split_of(name) == split:
            text = path.read_bytes()
            if len(text) >= _SHORTEST and text.isascii():
                found.append(Document(name, path, len(text)))
    return tuple(found)
