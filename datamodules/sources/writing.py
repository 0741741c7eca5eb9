"""Writes the splits of a prepared data set, and remembers what it was prepared from."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.shards.files import write_atomic
from datamodules.shards.manifest import RECIPE_NAME
from datamodules.shards.writer import SampleSource, write_shards
from datamodules.sources.splits import Split


def add_count_arguments(parser: argparse.ArgumentParser, counts: Mapping[Split, int], what: str) -> None:
    """Options of a source that draws its samples: how many of each split.

    Args:
        parser: of the modality.
        counts: defaults by split.
        what: a sample's name in the plural.
    """
    for split, count in counts.items():
        parser.add_argument(
            f"--{split}", type=_count, default=count, help=f"{what} to draw (default {count})"
        )


def _count(text: str) -> int:
    """A number of samples from the command line.

    Raises:
        ArgumentTypeError: it is negative.
    """
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"found {count}, expected 0 or more")
    return count


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every modality: seed, samples per shard, processes."""
    parser.add_argument("--seed", type=int, default=0, help="all draws follow from it")
    parser.add_argument("--shard_size", type=int, default=1000, help="samples per shard")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help=f"writing processes (default {workers})")


def refuse_another_recipe(out: Path, wanted: Mapping[str, Any], *, whole: bool) -> None:
    """Refuse a folder that was prepared otherwise, and say what differs.

    Args:
        out: the data set's folder.
        wanted: what the samples follow from, as JSON values.
        whole: also refuse what `wanted` says nothing about.

    Raises:
        DataError: something differs.
    """
    path = out / RECIPE_NAME
    if not path.is_file():
        return
    found, wanted = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(wanted))
    names = {*found, *wanted} if whole else set(wanted)
    changed = sorted(k for k in names if found.get(k) != wanted.get(k))
    if changed == ["counts", "files"] or changed == ["files"]:
        raise DataError(
            f"{out} was prepared with another set of files (or other texts) than are there now: {found.get('counts')} "
            f"samples, now {wanted.get('counts')}; choose another --out, or delete it first"
        )
    if changed:
        said = ", ".join(f"{k} ({found.get(k)}, now {wanted.get(k)})" for k in changed if k != "files")
        raise DataError(
            f"{out} was prepared with another {said}; expected the same or an empty folder: choose another --out, or "
            "delete it first"
        )


def write_splits(
    out: Path,
    splits: Mapping[str, SampleSource],
    recipe: Mapping[str, Any],
    *,
    shard_size: int,
    workers: int,
) -> None:
    """Write every split that has samples; what an interrupted run with the same recipe finished is kept.

    Args:
        out: the data set's folder.
        splits: samples by split name.
        recipe: what the samples follow from, as JSON values; kept in `prepared.json`.
        shard_size: samples per shard.
        workers: processes.

    Raises:
        DataError: there is nothing to write, or the folder holds data of another recipe: mixing the two must not
            happen unseen.
    """
    counts = {split: len(source) for split, source in splits.items()}
    if shard_size < 1 or not any(counts.values()):
        raise DataError(
            f"found {counts} samples at {shard_size} a shard, expected at least one of both; check the options"
        )
    wanted = {**recipe, "shard_size": shard_size}
    refuse_another_recipe(out, wanted, whole=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / RECIPE_NAME, json.dumps(wanted, indent=2).encode())
    for split, source in splits.items():
        if len(source):
            write_shards(out, split, source, shard_size=shard_size, workers=workers)
    print(f"wrote {', '.join(f'{n} {split}' for split, n in counts.items())} samples to {out}")
