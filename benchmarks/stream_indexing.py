"""Indexing against reading once: `python -m datamodules index` beside `cat` to nowhere."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.stream_records import Records
from datamodules.shards.index import build_index
from datamodules.shards.indexing import index_folder
from datamodules.shards.scan import scan
from datamodules.shards.writer import write_shards

LINKS = 8  # names of the one large shard, for all cores together


def measure_indexing(root: Path, kind: Records, repeats: int) -> dict[str, Any]:
    """One large shard in one process, with its checksum and without; eight of them on all cores.

    Cold: the page cache was told to forget the shard before each reading.
    """
    folder = root / f"{kind.field}-large"
    write_shards(folder, "train", replace(kind, count=kind.indexed), shard_size=kind.indexed, progress=False)
    (shard,) = (folder / "train").glob("*.tar")
    row: dict[str, Any] = {"records": kind.name, "bytes": shard.stat().st_size}
    for state in ("warm", "cold"):
        prepare = partial(_forget, shard) if state == "cold" else lambda: None
        row[state] = _against_cat([shard], partial(build_index, shard), prepare, repeats)
    row["without checksum"] = _against_cat([shard], partial(scan, shard), lambda: None, repeats)
    many = [shard.with_name(f"link-{i}.tar") for i in range(LINKS - 1)]
    for name in many:
        os.link(shard, name)
    row["all cores"] = _against_cat([shard, *many], partial(_index, folder / "train"), lambda: None, repeats)
    return row


def _index(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        index_folder(folder, exclude_bad=False)


def _against_cat(
    shards: Sequence[Path], work: Callable[[], object], prepare: Callable[[], None], repeats: int
) -> dict[str, Any]:
    cat = partial(subprocess.run, ["cat", *shards], stdout=subprocess.DEVNULL, check=True)
    used = time.process_time()
    pairs = [(_seconds(work, prepare), _seconds(cat, prepare)) for _ in range(repeats)]
    return {
        "seconds": [a for a, _ in pairs],
        "cpu_seconds": (time.process_time() - used) / repeats,  # of this process; `cat` runs in its own
        "cat_seconds": [b for _, b in pairs],
        "bytes": sum(path.stat().st_size for path in shards),
        "median_share_of_cat": statistics.median(b / a for a, b in pairs),
    }


def _seconds(work: Callable[[], object], prepare: Callable[[], None]) -> float:
    prepare()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
