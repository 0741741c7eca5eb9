"""`index.json`: which shards make up a split, how many samples each has, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.errors import DataError
from datamodules.shards.files import write_atomic

MANIFEST_NAME = "index.json"
RECIPE_NAME = "prepared.json"  # beside the splits that `prepare` writes
VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: file name in the split's folder.
        samples: number of samples.
        bytes: size of the file.
        sha256: checksum, or None if it was not taken.
        fields: fields that every sample of the shard has.
    """

    name: str
    samples: int
    bytes: int
    sha256: str | None
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The shards of a split, in order.

    Attributes:
        shards: the shards that are read.
        excluded: (name, reason) of damaged shards that the user accepted to leave out.
    """

    shards: tuple[ShardEntry, ...]
    excluded: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> int:
        """Samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity: a hash of name, samples and checksum (or bytes) of every shard, in order."""
        parts = [(s.name, s.samples, s.sha256 or s.bytes) for s in self.shards]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def save(self, root: Path) -> None:
        """Write `index.json`, atomically and last of all."""
        content = {
            "version": VERSION,
            "total": self.total,
            "fingerprint": self.fingerprint,
            "shards": [asdict(shard) for shard in self.shards],
            "excluded": [{"name": name, "reason": reason} for name, reason in self.excluded],
        }
        write_atomic(root / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """Read `index.json`.

        Raises:
            DataError: no folder, no shards, no manifest, or one of another version.
        """
        path = root / MANIFEST_NAME
        if not root.is_dir():
            raise DataError(
                f"the shard folder {root} does not exist; make shards with python -m datamodules prepare"
            )
        if not path.is_file():
            if reason := interrupted(root):
                raise DataError(reason)
            found = len(list(root.glob("*.tar")))
            cure = "index" if found else "prepare"
            raise DataError(
                f"{root} has {found} shards and no {MANIFEST_NAME}; make it with: python -m datamodules {cure}"
                + (f" {root}" if found else "")
            )
        return cls.parse(path.read_bytes(), str(root))

    @classmethod
    def parse(cls, content: bytes, root: str) -> Manifest:
        """Read the contents of an `index.json`.

        Args:
            content: its bytes.
            root: folder or URL it is from, for messages.

        Raises:
            DataError: it is damaged, of another version, or lists no sample.
        """
        path = f"{root}/{MANIFEST_NAME}"
        try:
            found = json.loads(content)
            if found["version"] != VERSION:
                raise DataError(
                    f"{path} has version {found['version']}, expected {VERSION}; "
                    f"make it anew with: python -m datamodules index {root}"
                )
            shards = tuple(ShardEntry(**{**s, "fields": tuple(s["fields"])}) for s in found["shards"])
            excluded = tuple((e["name"], e["reason"]) for e in found["excluded"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error!r}); make it anew with: python -m datamodules index {root}"
            ) from error
        if not sum(shard.samples for shard in shards):
            raise DataError(f"{path} lists no samples; make shards with python -m datamodules prepare")
        return cls(shards, excluded)


def interrupted(folder: Path) -> str | None:
    """Why a split is not complete that `prepare` began, and what to do; None if it is, or is of other origin."""
    if not (folder.parent / RECIPE_NAME).is_file() or (folder / MANIFEST_NAME).is_file():
        return None
    shards = [path.stem for path in folder.glob("*.tar")]
    wanted = max(
        (int(name.rpartition("-of-")[2]) for name in shards if re.search(r"-of-\d+$", name)), default=0
    )
    if len(shards) >= wanted > 0:  # all are there, and the manifest alone went
        return None
    return (
        f"{folder} has {len(shards)} of {wanted or 'its'} shards: prepare was interrupted there; give the same prepare "
        f"command again, it goes on (to use what is there, delete {folder.parent / RECIPE_NAME})"
    )
