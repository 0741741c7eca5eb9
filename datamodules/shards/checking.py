"""`index` and `verify`: shards from anywhere get their index; later they are held against it. A line per bad shard."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from datamodules.errors import DataError
from datamodules.shards.index import build_index, index_path, load_offsets
from datamodules.shards.manifest import Manifest, ShardEntry
from datamodules.shards.processes import map_files
from datamodules.shards.remote import is_url
from datamodules.shards.scan import scan

_PACKED = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")

_MANY_BYTES = 256 << 20  # below that, starting processes takes longer than it saves


def shard_folders(place: str) -> list[Path]:
    """Folders at or below a place that hold shards.

    Raises:
        DataError: there is none.
    """
    if is_url(place):
        raise DataError(
            f"{place} is an address, expected a local folder: index shards before they are uploaded; downloads are "
            "compared with the manifest by themselves"
        )
    root = Path(place)
    if folders := sorted({path.parent for path in root.rglob("*.tar")}):
        return folders
    if packed := [path for pattern in _PACKED for path in root.rglob(pattern)]:
        raise DataError(
            f"found {len(packed)} compressed shards under {root}, such as {packed[0].name}, expected plain "
            "*.tar, which can be read at any place: unpack them first (gunzip or the like)"
        )
    raise DataError(f"no *.tar under {root}; expected a folder of WebDataset shards; check the path")


class _Verdict(NamedTuple):
    """What indexing a shard came to: its entry or the reason why it has none, and what is worth a note."""

    path: Path
    entry: ShardEntry | None
    reason: str = ""
    note: str = ""


def _index_shard(path: Path, fields: Sequence[str]) -> _Verdict:
    try:
        found = scan(path, checksum=True)
        entry = build_index(path, found, fields=fields)
    except (DataError, OSError) as error:
        return _Verdict(path, None, reason=_reason(error))
    return _Verdict(path, entry, note="; ".join(found.missing(frozenset().union(*found.layouts))))


def index_folder(
    folder: Path, *, exclude_bad: bool, fields: Sequence[str] = (), workers: int | None = None
) -> None:
    """Index every shard of a folder and write its manifest.

    Args:
        folder: a split's folder.
        exclude_bad: leave damaged shards out, on record, instead of refusing the folder.
        fields: fields that every sample must have; a shard with one that has not is damaged.
        workers: processes; `None`: all cores, if there is enough to do.

    Raises:
        DataError: damaged shards, and `exclude_bad` is not set; or no good shard.
    """
    entries: list[ShardEntry] = []
    bad: list[tuple[str, str]] = []
    paths = sorted(folder.glob("*.tar"))
    work = map_files(partial(_index_shard, fields=fields), paths, _processes(paths, workers))
    for verdict in track(work, description=f"indexing {folder}", total=len(paths)):
        if verdict.entry is None:
            bad.append((verdict.path.name, verdict.reason))
            _say("bad", verdict.path, verdict.reason)
            continue
        entries.append(verdict.entry)
        if verdict.note:  # no damage, but a pair may want its caption
            _say("note", verdict.path, verdict.note)
    if bad and (not exclude_bad or not entries):
        cure = "mend them, or leave them out on record with --exclude-bad" if entries else "mend them"
        raise DataError(f"{len(bad)} of {len(bad) + len(entries)} shards in {folder} are damaged; {cure}")
    manifest = Manifest(tuple(entries), tuple(bad))
    manifest.save(folder)
    print(
        f"good  {folder}: {len(entries)} shards, {manifest.total} samples, fingerprint {manifest.fingerprint}"
    )


def verify_folder(folder: Path, *, checksum: bool, workers: int | None = None) -> int:
    """Check a folder's shards against its manifest.

    Args:
        folder: a split's folder.
        checksum: also compare sha256, which alone shows flipped data bytes.
        workers: processes; `None`: all cores, if there is enough to do.

    Returns:
        Number of shards that disagree, or that the manifest does not know.

    Raises:
        DataError: there is no manifest.
    """
    manifest = Manifest.load(folder)
    bad = 0
    processes = _processes(sorted(folder.glob("*.tar")), workers)
    work = map_files(partial(_disagreement, folder, checksum=checksum), manifest.shards, processes)
    reasons = track(work, description=f"verifying {folder}", total=len(manifest.shards))
    for entry, reason in zip(manifest.shards, reasons, strict=True):
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


def _disagreement(folder: Path, entry: ShardEntry, *, checksum: bool) -> str | None:
    path = folder / entry.name
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != entry.bytes:
        return f"{path.stat().st_size} bytes, the manifest says {entry.bytes}"
    try:
        found = scan(path, checksum=checksum and entry.sha256 is not None)
        if load_offsets(index_path(path)).tolist() != found.offsets:
            return "its index does not fit; run python -m datamodules index"
        if found.sha256 not in (None, entry.sha256):
            return "the checksum differs: bytes were changed"
    except (DataError, OSError) as error:
        return _reason(error)
    return None


def _processes(paths: Sequence[Path], asked: int | None) -> int:
    if asked is not None:
        return asked
    many = sum(path.stat().st_size for path in paths) >= _MANY_BYTES
    return len(os.sched_getaffinity(0)) if many else 1


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _say(verdict: str, path: Path, reason: str) -> None:
    print(f"{verdict:<5} {path}: {reason}", file=sys.stderr)
