"""From checked samples to shards: the part that pictures, texts and clips share."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.shards.files import write_atomic
from datamodules.shards.writer import SampleSource
from datamodules.sources.own.checking import Check, OnBad, check_items
from datamodules.sources.own.files import check_shares, give_keys, split_by_name
from datamodules.sources.splits import SPLITS
from datamodules.sources.writing import add_common_arguments, refuse_another_recipe, write_splits

Load = Callable[[dict[str, Any]], dict[str, bytes]]


@dataclass(frozen=True)
class OwnSamples:
    """Samples of one split, read when asked for; picklable, and small however many there are.

    Attributes:
        path: the split's list, a JSON line a sample.
        count: samples.
        load: reads a sample's members; its key is added here.
    """

    path: Path
    count: int
    load: Load

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Members of sample i."""
        sample = json.loads(_lines(self.path)[i])
        return {"__key__": sample["key"].encode(), **self.load(sample)}


@lru_cache(maxsize=4)
def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


@dataclass(frozen=True)
class Options:
    """What all kinds of own data have in common, from the command line."""

    val_share: float
    test_share: float
    on_error: OnBad
    seed: int
    shard_size: int
    workers: int


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that pictures, texts and clips share."""
    parser.add_argument(
        "--val_share", type=float, default=0.05, help="if the source has no splits of its own"
    )
    parser.add_argument("--test_share", type=float, default=0.05, help="likewise")
    parser.add_argument(
        "--on_error", choices=("skip", "raise"), default="skip", help="count bad files, or stop at the first"
    )
    add_common_arguments(parser)


def prepare_own(
    out: Path, items: list[dict[str, Any]], check: Check, load: Load, recipe: dict[str, Any], options: Options
) -> None:
    """Check the items, say what was skipped, deal the samples to splits and write them.

    A run that was interrupted goes on: what was checked is not checked again, finished shards are kept.

    Args:
        out: the data set's folder.
        items: with ``name``, and ``split`` where the source has splits.
        check: finds an item's samples; a sample has ``name`` and what ``load`` needs.
        load: a sample's members.
        recipe: what the samples follow from; kept in `prepared.json`.
        options: of the command line.

    Raises:
        DataError: nothing to train on, a bad file under ``on_error=raise``, or `out` holds other data.
    """
    check_shares(options.val_share, options.test_share)
    shares = {"val_share": options.val_share, "test_share": options.test_share, "seed": options.seed}
    # Before hours of checking, and before any list in the folder is overwritten.
    refuse_another_recipe(out, {**recipe, **shares, "shard_size": options.shard_size}, whole=False)
    findings = check_items(
        items, check, out, settings=recipe, workers=options.workers, on_bad=options.on_error
    )
    findings.report(out)
    if not findings.samples:
        raise DataError(
            f"none of {len(items)} files can be used, {out}/skipped.jsonl says why of each; expected at least one; "
            "check the source's format"
        )
    give_keys(findings.samples)
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for sample in findings.samples:
        # Samples of one file stay in one split, so that no text is in two.
        whole = sample.get("group", sample["name"])
        split = sample.get("split") or split_by_name(
            whole, options.val_share, options.test_share, options.seed
        )
        parts[split].append(json.dumps(sample).encode() + b"\n")
    sources: dict[str, SampleSource] = {}
    digest = hashlib.sha256()
    for split, lines in parts.items():
        content = b"".join(lines)
        digest.update(content)
        path = out / f"{split}.files.jsonl"
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)
        sources[split] = OwnSamples(path, len(lines), load)
    counts = {split: len(lines) for split, lines in parts.items()}
    if not counts["train"]:
        raise DataError(f"there are no samples to train on, found {counts}; expected some; mend the shares")
    wanted = {**recipe, **shares, "counts": counts, "files": digest.hexdigest()}
    write_splits(out, sources, wanted, shard_size=options.shard_size, workers=options.workers)
