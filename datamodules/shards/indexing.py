"""`index`: shards from anywhere get their index and a manifest. A line per bad shard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import DataError
from datamodules.shards.folders import PACKED, processes_for, reason_of
from datamodules.shards.index import build_index
from datamodules.shards.manifest import Manifest, ShardEntry, interrupted
from datamodules.shards.processes import map_files
from datamodules.shards.progress import say, track
from datamodules.shards.scan import Scan, scan


class _Verdict(NamedTuple):
    """What indexing a shard came to: its entry or the reason why it has none, what is worth a note, all its fields."""

    path: Path
    entry: ShardEntry | None
    reason: str = ""
    note: str = ""
    fields: frozenset[str] = frozenset()


def _index_shard(path: Path, fields: Sequence[str]) -> _Verdict:
    try:
        found = scan(path, checksum=True)
        entry = build_index(path, found, fields=fields)
    except (DataError, OSError) as error:
        return _Verdict(path, None, reason=reason_of(error))
    seen: frozenset[str] = frozenset().union(*found.layouts)
    return _Verdict(path, entry, note="; ".join([*found.missing(seen), *_unread(found)]), fields=seen)


def _unread(found: Scan) -> list[str]:
    if not found.links:
        return []
    return [
        f"{len(found.links)} members are links or other special files, which are not read, first {found.links[0]!r}"
    ]


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
        DataError: damaged shards, and `exclude_bad` is not set; or no good shard; or `prepare` is not done with it.
    """
    if reason := interrupted(folder):
        raise DataError(reason)
    entries: list[ShardEntry] = []
    seen: list[frozenset[str]] = []
    bad: list[tuple[str, str]] = []
    paths = sorted(folder.glob("*.tar"))
    work = map_files(partial(_index_shard, fields=fields), paths, processes_for(paths, workers))
    for verdict in track(work, f"indexing {folder}", len(paths)):
        if verdict.entry is None:
            bad.append((verdict.path.name, verdict.reason))
            say("bad", f"{verdict.path}: {verdict.reason}")
            continue
        entries.append(verdict.entry)
        seen.append(verdict.fields)
        if verdict.note:  # no damage, but a pair may want its caption
            say("note", f"{verdict.path}: {verdict.note}")
    _note_folder(folder, entries, seen)
    if bad and (not exclude_bad or not entries):
        cure = "mend them, or leave them out on record with --exclude-bad" if entries else "mend them"
        raise DataError(f"{len(bad)} of {len(bad) + len(entries)} shards in {folder} are damaged; {cure}")
    manifest = Manifest(tuple(entries), tuple(bad))
    manifest.save(folder)
    shared = frozenset.intersection(*(frozenset(entry.fields) for entry in entries))
    stored = f"each with {', '.join(sorted(shared))}" if shared else "which have no field in common"
    out = f", {len(bad)} bad ones left out" if bad else ""
    print(
        f"good  {folder}: {len(entries)} shards{out}, {manifest.total} samples {stored}; "
        f"fingerprint {manifest.fingerprint}"
    )


def _note_folder(folder: Path, entries: Sequence[ShardEntry], seen: Sequence[frozenset[str]]) -> None:
    """Say what only a look at all shards shows: a field that some lack altogether, and archives that nobody reads."""
    for field in sorted(frozenset().union(*seen)):
        if without := [
            entry.name for entry, fields in zip(entries, seen, strict=True) if field not in fields
        ]:
            say(
                "note",
                f"{folder}: {len(without)} of {len(entries)} shards have no {field!r} at all, first {without[0]}",
            )
    if packed := sorted(path.name for pattern in PACKED for path in folder.glob(pattern)):
        say(
            "note",
            f"{folder}: {len(packed)} compressed archives are not read, first {packed[0]}; unpack them",
        )
