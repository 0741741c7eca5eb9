"""A split's shards as the stream sees them: names, sizes, identity, and where their files lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datamodules.errors import DataError
from datamodules.shards.cache import ShardCache
from datamodules.shards.manifest import MANIFEST_NAME, Manifest, interrupted
from datamodules.shards.reader import ShardFile
from datamodules.shards.remote import Remote, is_url


@dataclass(frozen=True)
class Source:
    """The shards of one split.

    Attributes:
        root: directory or URL.
        shards: in manifest order.
        locate: local path of a file by name; fetches it first if the root is a URL. Picklable.
        fingerprint: identity of the shards.
        manifest: what `index.json` says.
    """

    root: str
    shards: tuple[ShardFile, ...]
    locate: Callable[[str], Path]
    fingerprint: str
    manifest: Manifest

    @property
    def total(self) -> int:
        """Samples."""
        return sum(s.samples for s in self.shards)

    def require(self, fields: Sequence[str]) -> None:
        """See that every sample has some fields.

        Raises:
            DataError: a shard lacks one.
        """
        for shard in self.manifest.shards:
            if missing := [f for f in fields if f not in shard.fields]:
                raise DataError(
                    f"samples in {self.root} lack {', '.join(missing)}, found {', '.join(shard.fields)}, first in "
                    f"{shard.name}: prepare the shards with these fields (`python -m datamodules index ROOT --fields "
                    f"{','.join(fields)}` names every shard)"
                )

    @classmethod
    def open(
        cls, root: str, cache_dir: str | Path | None = None, cache_bytes: int | None = None
    ) -> Source | None:
        """Open a split; None if there is no manifest.

        Args:
            root: directory or URL of the split.
            cache_dir: for a URL, where its shards are kept on this machine; `None`: `default_cache()`.
            cache_bytes: size limit of that directory; `None`: as the disk allows.

        Raises:
            DataError: the manifest is damaged, or cannot be fetched.
        """
        if is_url(root):
            remote = Remote(root)
            try:
                manifest = Manifest.parse(remote.read(MANIFEST_NAME), root)
            except FileNotFoundError:
                return None
            locate: Callable[[str], Path] = ShardCache.of(remote, manifest, cache_dir, cache_bytes)
        elif (Path(root) / MANIFEST_NAME).is_file():
            manifest, locate = Manifest.load(Path(root)), partial(_local, root)
        else:
            return None
        shards = tuple(ShardFile(s.name, s.samples, s.bytes) for s in manifest.shards)
        return cls(root, shards, locate, manifest.fingerprint, manifest)


def _local(root: str, name: str) -> Path:
    return Path(root) / name


def absence_of(root: str, split: str) -> str:
    """Why a split cannot be opened, and what to do, in one line.

    Args:
        root: directory or URL of the data set, in which `Source.open` found no such split.
        split: its name.
    """
    base = f"found no shards with an index in {root.rstrip('/')}/{split}"
    if is_url(root):
        return f"{base}; expected its {MANIFEST_NAME} there: upload the whole folder, index and all"
    if not Path(root).is_dir():
        return f"{base}: there is no folder {root}; expected one with train/, val/ and test/; check root"
    if (Path(root) / MANIFEST_NAME).is_file():
        return (
            f"{base}: {root} holds shards itself; expected a folder with train/, val/ and test/ as root: give the one "
            f"above it, or deal these shards to splits with `python -m datamodules index {root} --split train=PATTERN`"
        )
    if reason := interrupted(Path(root) / split):
        return reason
    return (
        f"{base}; make some with `python -m datamodules prepare` or index yours with `python -m datamodules index "
        f"{root.rstrip('/')}/{split}`"
    )
