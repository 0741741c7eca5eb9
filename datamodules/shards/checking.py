"""`index` and `verify`: shards from anywhere get their index; later they are held against it. A line per bad shard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of
from datamodules.shards.index import build_index, index_path, load_offsets, scan
from datamodules.shards.manifest import Manifest, ShardEntry

_PACKED = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")


def shard_folders(root: Path) -> list[Path]:
    """Folders at or below `root` that hold shards.

    Raises:
        DataError: there is none.
    """
    if folders := sorted({path.parent for path in root.rglob("*.tar")}):
        return folders
    if packed := [path for pattern in _PACKED for path in root.rglob(pattern)]:
        raise DataError(
            f"found {len(packed)} compressed shards under {root}, such as {packed[0].name}, expected plain "
            "*.tar, which can be read at any place: unpack them first (gunzip or the like)"
        )
    raise DataError(f"no *.tar under {root}; expected a folder of WebDataset shards; check the path")


def index_folder(folder: Path, *, exclude_bad: bool, fields: Sequence[str] = ()) -> int:
    """Index every shard of a folder and write its manifest.

    Args:
        folder: a split's folder.
        exclude_bad: leave damaged shards out, on record, instead of refusing the folder.
        fields: fields that every sample must have; a shard with one that has not is damaged.

    Returns:
        Number of damaged shards.

    Raises:
        DataError: damaged shards, and `exclude_bad` is not set; or no good shard.
    """
    entries: list[ShardEntry] = []
    bad: list[tuple[str, str]] = []
    for path in track(sorted(folder.glob("*.tar")), description=f"indexing {folder}"):
        try:
            found = scan(path)
            entries.append(build_index(path, found, fields=fields))
            if uneven := found.missing(frozenset().union(*found.layouts)):
                _say("note", path, "; ".join(uneven))  # no damage, but a pair may want its caption
        except (DataError, OSError) as error:
            bad.append((path.name, _reason(error)))
            _say("bad", path, bad[-1][1])
    if bad and (not exclude_bad or not entries):
        cure = "mend them, or leave them out on record with --exclude-bad" if entries else "mend them"
        raise DataError(f"{len(bad)} of {len(bad) + len(entries)} shards in {folder} are damaged; {cure}")
    manifest = Manifest(tuple(entries), tuple(bad))
    manifest.save(folder)
    print(
        f"good  {folder}: {len(entries)} shards, {manifest.total} samples, fingerprint {manifest.fingerprint}"
    )
    return len(bad)


def verify_folder(folder: Path, *, checksum: bool) -> int:
    """Check a folder's shards against its manifest.

    Args:
        folder: a split's folder.
        checksum: also compare sha256, which alone shows flipped data bytes.

    Returns:
        Number of shards that disagree, or that the manifest does not know.

    Raises:
        DataError: there is no manifest.
    """
    manifest = Manifest.load(folder)
    bad = 0
    for entry in track(manifest.shards, description=f"verifying {folder}"):
        reason = _disagreement(folder / entry.name, entry, checksum=checksum)
        if reason:
            bad += 1
            _say("bad", folder / entry.name, reason)
    known = {entry.name for entry in manifest.shards} | {name for name, _ in manifest.excluded}
    unknown = [path for path in sorted(folder.glob("*.tar")) if path.name not in known]
    for path in unknown:
        _say("bad", path, "the manifest does not know it; run python -m datamodules index")
    for name, reason in manifest.excluded:
        _say("out", folder / name, f"excluded when it was indexed: {reason}")
    verdict, shards = "bad" if bad or unknown else "good", len(manifest.shards)
    print(f"{verdict:<5} {folder}: {shards - bad} of {shards} shards agree")
    return bad + len(unknown)


def _disagreement(path: Path, entry: ShardEntry, *, checksum: bool) -> str | None:
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != entry.bytes:
        return f"{path.stat().st_size} bytes, the manifest says {entry.bytes}"
    try:
        if load_offsets(index_path(path)).tolist() != scan(path).offsets:
            return "its index does not fit; run python -m datamodules index"
        if checksum and entry.sha256 and sha256_of(path) != entry.sha256:
            return "the checksum differs: bytes were changed"
    except (DataError, OSError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _say(verdict: str, path: Path, reason: str) -> None:
    print(f"{verdict:<5} {path}: {reason}", file=sys.stderr)
