"""Writes shards: parallel, atomic, restartable, byte-identical for the same input."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from rich.progress import track

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of, write_atomic
from datamodules.shards.index import build_index, index_path, load_offsets
from datamodules.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from datamodules.shards.tar import split_key


class SampleSource(Protocol):
    """Samples by number, so that shards can be made side by side. Picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, bytes]:
        """Fields of a sample by extension, and its key (UTF-8) under ``__key__``."""
        ...


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


def _archive(source: SampleSource, start: int, stop: int, fields: Sequence[str] | None) -> bytes:
    """The bytes of one shard. A shard is at most a few hundred megabytes, so it is made in memory."""
    from webdataset import TarWriter

    buffer = io.BytesIO()
    seen: set[str] = set()
    # Fixed owner and time: the same samples give the same bytes.
    with TarWriter(buffer, user="qm", group="qm", mtime=0, encoder=False) as tar:
        for index in range(start, stop):
            sample = source[index]
            key = _check(sample, fields, index)
            if key in seen:
                raise DataError(f"the key {key!r} occurs twice, again at sample {index}; keys must be unique")
            seen.add(key)
            tar.write({**sample, "__key__": key})
    return buffer.getvalue()


def _write(job: tuple[Path, int, int], source: SampleSource, fields: Sequence[str] | None) -> ShardEntry:
    path, start, stop = job
    write_atomic(path, _archive(source, start, stop, fields))
    return build_index(path)  # walks what was written, so a shard that has an index has been verified


def _finished(path: Path, samples: int, old: dict[str, ShardEntry]) -> bool:
    """Whether an earlier run completed this shard: tar, index and checksum agree."""
    entry = old.get(path.name)
    if entry is None or not path.is_file() or not index_path(path).is_file():
        return False
    return len(load_offsets(index_path(path))) == samples + 1 and sha256_of(path) == entry.sha256


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

    Args:
        out_dir: the data set's folder; the shards go to ``out_dir/split``.
        split: ``train``, ``val`` or ``test``.
        source: the samples.
        shard_size: samples per shard.
        fields: fields that every sample must have.
        workers: processes; shards do not depend on their number.
        progress: show a progress bar.

    Returns:
        The manifest, written last: a folder without one is not complete.

    Raises:
        DataError: no samples, a bad key, or a missing field.
    """
    if not len(source):
        raise DataError(
            f"there are no samples for {out_dir / split}; expected at least one; check the source"
        )
    folder = out_dir / split
    folder.mkdir(parents=True, exist_ok=True)
    total = -(-len(source) // shard_size)
    jobs = [
        (
            folder / f"{split}-{i:06d}-of-{total:06d}.tar",
            i * shard_size,
            min((i + 1) * shard_size, len(source)),
        )
        for i in range(total)
    ]
    old = _earlier(folder)
    done = {path: old[path.name] for path, start, stop in jobs if _finished(path, stop - start, old)}
    todo = [job for job in jobs if job[0] not in done]
    write = partial(_write, source=source, fields=fields)
    bar = partial(track, description=f"{split} shards", total=len(todo), disable=not progress or not todo)
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            entries = list(bar(pool.map(write, todo)))
    else:
        entries = list(bar(map(write, todo)))
    done.update(zip((path for path, _, _ in todo), entries, strict=True))
    _remove_others(folder, {path.name for path, _, _ in jobs})
    manifest = Manifest(tuple(done[path] for path, _, _ in jobs))
    manifest.save(folder)
    return manifest


def _earlier(folder: Path) -> dict[str, ShardEntry]:
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    return {entry.name: entry for entry in Manifest.load(folder).shards}


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove shards of an earlier run with another number of shards: they would be read as data."""
    for path in folder.glob("*.tar*"):
        if path.name.removesuffix(".idx") not in names:
            path.unlink()
