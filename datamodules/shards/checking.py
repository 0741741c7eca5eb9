"""`verify`: shards are held against their manifest and index. A line per bad shard."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from datamodules.errors import DataError
from datamodules.shards.folders import processes_for, reason_of
from datamodules.shards.index import index_path, load_offsets
from datamodules.shards.manifest import Manifest, ShardEntry
from datamodules.shards.processes import map_files
from datamodules.shards.progress import say, track
from datamodules.shards.scan import scan


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
    processes = processes_for(sorted(folder.glob("*.tar")), workers)
    work = map_files(partial(_disagreement, folder, checksum=checksum), manifest.shards, processes)
    reasons = track(work, f"verifying {folder}", len(manifest.shards))
    for entry, reason in zip(manifest.shards, reasons, strict=True):
        if reason:
            bad += 1
            say("bad", f"{folder / entry.name}: {reason}")
    known = {entry.name for entry in manifest.shards} | {name for name, _ in manifest.excluded}
    unknown = [path for path in sorted(folder.glob("*.tar")) if path.name not in known]
    for path in unknown:
        say("bad", f"{path}: the manifest does not know it; run python -m datamodules index")
    for name, reason in manifest.excluded:
        say("out", f"{folder / name}: excluded when it was indexed: {reason}")
    verdict, shards = "bad" if bad or unknown else "good", len(manifest.shards)
    how = "checksums as well" if checksum else "sizes, headers and index; --sha256 compares all bytes"
    print(f"{verdict:<5} {folder}: {shards - bad} of {shards} shards agree ({how})")
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
        return reason_of(error)
    return None
