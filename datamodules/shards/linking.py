"""Splits out of one folder of shards, without a copy: a folder of links for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.errors import DataError

SPLITS = ("train", "val", "test")


def link_splits(root: Path, wanted: Sequence[str]) -> list[Path]:
    """Link shards of `root` into `root/train`, `root/val` and `root/test`.

    Args:
        root: folder with the shards, at any depth.
        wanted: `SPLIT=PATTERN` each, the pattern as in a shell and relative to `root`.

    Returns:
        The splits' folders, to be indexed.

    Raises:
        DataError: no such split, a pattern without shards, a shard or a name twice, or a file in the way.
    """
    links: dict[Path, Path] = {}
    owner: dict[Path, Path] = {}
    for folder, shard in _pairs(root, wanted):
        link = folder / shard.name
        if owner.setdefault(shard, folder) != folder or links.setdefault(link, shard) != shard:
            raise DataError(
                f"{shard} would be in two splits, or has the name of another shard of {folder.name}; expected each "
                "shard in one split under a name of its own; mend --split"
            )
    for link, shard in links.items():
        _link(link, shard, root)
    return sorted({link.parent for link in links})


def _pairs(root: Path, wanted: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """(split's folder, shard) for every shard that a pattern fits."""
    for entry in wanted:
        split, _, pattern = entry.partition("=")
        if split not in SPLITS or not pattern or Path(pattern).is_absolute():
            raise DataError(f"--split is {entry!r}, expected train=PATTERN, val=PATTERN or test=PATTERN")
        shards = [p for p in sorted(root.glob(pattern)) if p.suffix == ".tar" and not p.is_symlink()]
        if not shards:
            raise DataError(f"no *.tar below {root} fits {pattern!r}; check the pattern of --split")
        yield from ((root / split, shard) for shard in shards)


def _link(link: Path, shard: Path, root: Path) -> None:
    if link == shard:  # it lies in the split's folder already
        return
    link.parent.mkdir(exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise DataError(f"{link} is in the way of a link to {shard}; move it away")
    link.symlink_to(Path("..", shard.relative_to(root)))
