"""Writes shards: parallel, atomic, restartable, byte-identical for the same input.

A shard is finished once its checksum file lies beside it, which is written last. The manifest is taken away
before a shard changes and written when all are finished, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from datamodules.errors import DataError
from datamodules.shards.files import sync_directory, write_atomic
from datamodules.shards.hashing import Word
from datamodules.shards.index import entry_of, index_path, load_offsets, write_index
from datamodules.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from datamodules.shards.processes import map_files
from datamodules.shards.progress import track
from datamodules.shards.scan import Scan, scan
from datamodules.shards.tar import split_key

CHECKSUM_SUFFIX = ".sha256"  # `sha256sum --check *.sha256` reads these files


class SampleSource(Protocol):
    """Samples by number, so that shards can be made side by side. Picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, bytes]:
        """Fields of a sample by extension, and its key (UTF-8) under ``__key__``."""
        ...


class _Job(NamedTuple):
    """A shard to be written: samples [start, stop)."""

    path: Path
    start: int
    stop: int


class _Shard(NamedTuple):
    """A finished shard; `keys` are 64-bit hashes of its keys."""

    entry: ShardEntry
    keys: Word


def _check(sample: dict[str, bytes], fields: Sequence[str] | None, index: int) -> str:
    key = sample["__key__"].decode()
    found = set(sample) - {"__key__"}
    if any(split_key(f"{key}.{field}") != (key, field) for field in found) or not found:
        raise DataError(
            f"sample {index} has the key {key!r} and the fields {sorted(found)}; expected a key without a dot in its "
            "base name and lower-case fields; rename them"
        )
    if missing := sorted(set(fields or ()) - found):
        raise DataError(
            f"sample {key!r} lacks the fields {missing}, found {sorted(found)}; add them to the source"
        )
    return key


def _archive(source: SampleSource, job: _Job, fields: Sequence[str] | None) -> bytes:
    """The bytes of one shard. A shard is at most a few hundred megabytes, so it is made in memory."""
    from webdataset import TarWriter

    buffer = io.BytesIO()
    seen: set[str] = set()
    # Fixed owner and time: the same samples give the same bytes.
    with TarWriter(buffer, user="qm", group="qm", mtime=0, encoder=False) as tar:
        for index in range(job.start, job.stop):
            sample = source[index]
            key = _check(sample, fields, index)
            if key in seen:
                raise DataError(f"the key {key!r} occurs twice, again at sample {index}; keys must be unique")
            seen.add(key)
            tar.write({**sample, "__key__": key})
    return buffer.getvalue()


def _write(job: _Job, source: SampleSource, fields: Sequence[str] | None) -> _Shard:
    content = _archive(source, job, fields)
    _withdraw_manifest(job.path.parent)
    _checksum_path(job.path).unlink(missing_ok=True)
    write_atomic(job.path, content)
    found = scan(job.path)._replace(
        sha256=hashlib.sha256(content).hexdigest()
    )  # of what was meant to be written
    write_index(job.path, found)
    write_atomic(_checksum_path(job.path), f"{found.sha256}  {job.path.name}\n".encode())
    return _shard(job.path, found)


def _shard(path: Path, found: Scan) -> _Shard:
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in found.keys]
    return _Shard(entry_of(path, found), np.frombuffer(b"".join(digests), np.uint64))


def _finished(job: _Job, fields: Sequence[str] | None) -> _Shard | None:
    """What an earlier run left of this shard, if tar, index and checksum agree."""
    try:
        checksum = _checksum_path(job.path).read_text().split()[0]
        found = scan(job.path, checksum=True)
        agree = (
            len(found.keys) == job.stop - job.start
            and load_offsets(index_path(job.path)).tolist() == found.offsets
            and not found.missing(fields or ())
            and found.sha256 == checksum
        )
    except (OSError, IndexError, DataError):
        return None
    return _shard(job.path, found) if agree else None


def _make(job: _Job, source: SampleSource, fields: Sequence[str] | None) -> _Shard:
    return _finished(job, fields) or _write(job, source, fields)


def write_shards(
    out_dir: Path,
    split: str,
    source: SampleSource,
    *,
    shard_size: int = 1000,
    fields: Sequence[str] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Manifest:
    """Write one split.

    Shards that an earlier run finished are kept, so the folder must be one that was begun with the same
    source and shard size; `datamodules.sources.writing` sees to that.

    Args:
        out_dir: the data set's folder; the shards go to ``out_dir/split``.
        split: ``train``, ``val`` or ``test``.
        source: the samples.
        shard_size: samples per shard.
        fields: fields that every sample must have.
        workers: processes, each with one shard in memory; shards do not depend on their number.
        progress: show a progress bar.

    Returns:
        The manifest, written last: a folder without one is not complete.

    Raises:
        DataError: no samples, a bad key, a key that occurs twice, or a missing field.
    """
    if not len(source):
        raise DataError(
            f"there are no samples for {out_dir / split}; expected at least one; check the source"
        )
    folder = out_dir / split
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(folder, split, len(source), shard_size)
    _remove_others(folder, jobs)
    make = partial(_make, source=source, fields=fields)
    made = map_files(make, jobs, workers)
    shards = list(track(made, f"{split} shards", len(jobs)) if progress else made)
    _refuse_double_keys([job.path for job in jobs], [shard.keys for shard in shards])
    manifest = Manifest(tuple(shard.entry for shard in shards))
    manifest.save(folder)
    return manifest


def _jobs(folder: Path, split: str, samples: int, shard_size: int) -> list[_Job]:
    total = -(-samples // shard_size)
    names = (folder / f"{split}-{i:06d}-of-{total:06d}.tar" for i in range(total))
    return [_Job(path, i * shard_size, min((i + 1) * shard_size, samples)) for i, path in enumerate(names)]


def _checksum_path(shard: Path) -> Path:
    return shard.with_name(shard.name + CHECKSUM_SUFFIX)


def _remove_others(folder: Path, jobs: Iterable[_Job]) -> None:
    """Remove what would be read as data, or never again: other numbers of shards, files cut by a kill."""
    names = {job.path.name + suffix for job in jobs for suffix in ("", ".idx", CHECKSUM_SUFFIX)}
    if others := [path for path in folder.glob("*.tar*") if path.name not in names]:
        _withdraw_manifest(folder)
    for path in others:
        path.unlink()


def _withdraw_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    sync_directory(folder)


def _refuse_double_keys(paths: Sequence[Path], keys: Sequence[Word]) -> None:
    """Keys must be unique over the split: they name samples in predictions and in error messages."""
    values, counts = np.unique(np.concatenate(keys), return_counts=True)
    suspects = values[counts > 1]
    if not len(suspects):
        return
    first: dict[str, Path] = {}
    for path in (p for p, k in zip(paths, keys, strict=True) if np.isin(k, suspects).any()):
        for key in scan(path).keys:
            if key in first:
                _checksum_path(path).unlink()  # else a restart would keep these shards
                _checksum_path(first[key]).unlink()
                raise DataError(
                    f"the key {key!r} occurs in {first[key].name} and in {path.name}; keys must be unique"
                )
            first[key] = path
