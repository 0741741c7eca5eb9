"""The stream against webdataset's own reader on the same shards, in ratios taken in one run.

Claims: at least webdataset's speed with 0, 1 and 2 workers, for 2 KB texts, 100 KB records and JPEGs decoded to
tensors, although ours shuffles fully and webdataset through a buffer of 1000; a resume at 90 % of an epoch costs
under 2 % of what StatefulDataLoader needs; the order of 1e8 samples costs under 1 GB and under 1 ms per batch.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import resource
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._record import earlier_results, write_results
from benchmarks.stream_indexing import LINKS, measure_indexing
from benchmarks.stream_records import BATCH, BUFFER, KINDS, Records, ours, stateful, theirs
from datamodules.shards.order import EpochOrder, OrderSettings
from datamodules.shards.writer import write_shards

PARTS = ("throughput", "indexing", "resume", "order")


def main() -> None:
    """Measure, print tables, write ``benchmarks/results/stream.json`` after each part."""
    parser = argparse.ArgumentParser("python -m benchmarks stream")
    parser.add_argument("--records", choices=[kind.field for kind in KINDS], help="only this kind of records")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved passes (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual samples (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kinds = [_scaled(kind, options.share) for kind in KINDS if options.records in (None, kind.field)]
    parts = [part for part in PARTS if options.part in (None, part)]
    if "resume" in parts and find_spec("torchdata") is None:
        print("torchdata is not installed, so resuming is left out: pip install -e '.[bench]'")
        parts.remove("resume")
    configuration = _configuration(options.repeats, options.share)
    results = earlier_results("stream", configuration)
    with tempfile.TemporaryDirectory() as folder:
        for kind, part in itertools.product(kinds, parts):
            _measure(Path(folder), kind, part, options.repeats, results)
            write_results("stream", configuration, **results)
    _show(results)


def _measure(root: Path, kind: Records, part: str, repeats: int, results: dict[str, Any]) -> None:
    """One part for one kind of records; resuming and ordering are measured with the first kind alone."""
    folder = root / kind.field / "train"
    write_shards(root / kind.field, "train", kind, shard_size=kind.shard_size, progress=False)
    if part == "throughput":
        _put(results, part, measure_throughput(folder, kind, repeats))
    elif part == "indexing":
        _put(results, part, [measure_indexing(root, kind, repeats)])
    elif kind.name == KINDS[0].name:
        results[part] = measure_resume(folder, kind, repeats) if part == "resume" else measure_order()


def _put(results: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Replace a kind's rows, keep the others'."""
    names = {row["records"] for row in rows}
    results[part] = [row for row in results.get(part, []) if row["records"] not in names] + rows


def _scaled(kind: Records, share: float) -> Records:
    count, indexed = (max(4 * BATCH, int(n * share)) for n in (kind.count, kind.indexed))
    return replace(kind, count=count, indexed=indexed, shard_size=min(kind.shard_size, count // 2))


def _configuration(repeats: int, share: float) -> dict[str, Any]:
    return {
        **{name: version(name) for name in ("webdataset", "torchdata") if find_spec(name)},
        "cpus": os.cpu_count(),
        "batch": BATCH,
        "repeats": repeats,
        "records": [vars(_scaled(kind, share)) for kind in KINDS],
        "shuffle": f"ours the whole epoch, webdataset's shards and a buffer of {BUFFER}",
        "indexing on all cores": f"{LINKS} names of one shard",
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def one_pass(make: Callable[[], Iterable[dict[str, Any]]], count: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of a whole pass, starting and ending of workers included."""
    begin, used = time.perf_counter(), _cpu_seconds()
    seen = sum(len(batch["data"]) for batch in make())
    assert seen >= count, f"read {seen} of {count}"
    return time.perf_counter() - begin, _cpu_seconds() - used


def measure_throughput(folder: Path, kind: Records, repeats: int) -> list[dict[str, Any]]:
    """Interleaved repeats, so that what else the machine does hits both alike; the first is not counted."""
    rows = []
    for workers in (0, 1, 2):
        rounds = []
        for _ in range(repeats + 1):
            mine = one_pass(lambda: ours(folder, kind, workers), kind.count)  # noqa: B023
            rounds.append((mine, one_pass(lambda: theirs(folder, kind, workers), kind.count)))  # noqa: B023
        del rounds[0]
        ratios = [b[0] / a[0] for a, b in rounds]
        rows.append(
            {
                "records": kind.name,
                "workers": workers,
                "load": os.getloadavg()[0],
                "ours": [kind.count / mine[0] for mine, _ in rounds],
                "webdataset": [kind.count / rival[0] for _, rival in rounds],
                "ratios": ratios,
                "median_ratio": statistics.median(ratios),
                "median_cpu_ratio": statistics.median(b[1] / a[1] for a, b in rounds),
            }
        )
    return rows


def measure_resume(folder: Path, kind: Records, repeats: int) -> dict[str, Any]:
    """Seconds from making a loader to its first batch at 90 % of an epoch, from a saved state."""
    place = int(0.9 * kind.count) // BATCH * BATCH
    reached = stateful(folder, kind)
    for _ in itertools.islice(reached, place // BATCH):
        pass
    their_state, my_state = reached.state_dict(), ours(folder, kind, 0).state_dict() | {"consumed": place}
    mine: list[float] = []
    rival: list[float] = []
    for _ in range(repeats):
        for make, state, times in (
            (lambda: ours(folder, kind, 0), my_state, mine),
            (lambda: stateful(folder, kind), their_state, rival),
        ):
            begin = time.perf_counter()
            loader = make()
            loader.load_state_dict(state)
            next(iter(loader))
            times.append(time.perf_counter() - begin)
    shares = [a / b for a, b in zip(mine, rival, strict=True)]
    return {
        "records": kind.name,
        "samples_before": place,
        "ours_seconds": mine,
        "stateful_dataloader_seconds": rival,
        "shares": shares,
        "median_share": statistics.median(shares),
    }


def measure_order() -> dict[str, Any]:
    """Memory and time of the order of 1e8 simulated samples in 10 000 shards."""
    counts = np.full(10_000, 10_000)
    tracemalloc.start()
    begin = time.perf_counter()
    order = EpochOrder(counts, OrderSettings())
    build = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for first in range(0, 10**8, 10**6):
        begin = time.perf_counter()
        order(np.arange(first, first + BATCH))
        times.append(time.perf_counter() - begin)
    return {"build_seconds": build, "peak_bytes": peak, "median_batch_seconds": statistics.median(times)}


def _show(results: dict[str, Any]) -> None:
    table = Table(
        "records", "workers", "ours, samples/s", "webdataset, samples/s", "ratio", "least..most", "CPU ratio"
    )
    for row in results.get("throughput", []):
        table.add_row(
            row["records"],
            str(row["workers"]),
            f"{statistics.median(row['ours']):.0f}",
            f"{statistics.median(row['webdataset']):.0f}",
            f"{row['median_ratio']:.2f}",
            f"{min(row['ratios']):.2f}..{max(row['ratios']):.2f}",
            f"{row['median_cpu_ratio']:.2f}",
        )
    console = Console(width=110)
    console.print(table)
    indexing = Table("indexing", "how", "MB/s", "share of cat", "MB per CPU second")
    for row in results.get("indexing", []):
        for how in ("warm", "cold", "without checksum", "all cores"):
            found = row[how]
            speed = found["bytes"] / statistics.median(found["seconds"]) / 1e6
            used = "-" if how == "all cores" else f"{found['bytes'] / found['cpu_seconds'] / 1e6:.0f}"
            indexing.add_row(row["records"], how, f"{speed:.0f}", f"{found['median_share_of_cat']:.0%}", used)
    console.print(indexing)
    if resume := results.get("resume"):
        console.print(f"resume at 90 %: {resume['median_share']:.2%} of StatefulDataLoader's time")
    if order := results.get("order"):
        console.print(
            f"order of 1e8 samples: built in {order['build_seconds']:.2f} s, {order['peak_bytes'] / 1e6:.0f} MB, "
            f"{order['median_batch_seconds'] * 1e6:.0f} us per batch of {BATCH}"
        )


if __name__ == "__main__":
    main()
