"""The stream against webdataset's own reader on the same shards, in ratios taken in one run.

Claims: at least webdataset's speed with 0, 1 and 2 workers, for 2 KB texts, 100 KB records and JPEGs decoded to
tensors, although ours shuffles fully and webdataset through a buffer of 1000; a resume at 90 % of an epoch costs
under 2 % of what StatefulDataLoader needs; the order of 1e8 samples costs under 1 GB and under 1 ms per batch.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.shards.decode import decode_image
from datamodules.shards.geometry import Geometry
from datamodules.shards.index import build_index
from datamodules.shards.loader import StreamLoader
from datamodules.shards.order import EpochOrder, OrderSettings
from datamodules.shards.source import Source
from datamodules.shards.stream import StreamSpec
from datamodules.shards.writer import write_shards

RESULTS = Path(__file__).parent / "results" / "stream.json"
BATCH, REPEATS, BUFFER, JPEG_SIDE = 32, 5, 1000, 224


@dataclass(frozen=True)
class Records:
    """Made-up samples of one kind.

    Attributes:
        name: shown in the table.
        field: extension.
        count: samples.
        shard_size: samples per shard.
        size: bytes of a sample; 0 = a JPEG.
    """

    name: str
    field: str
    count: int
    shard_size: int
    size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, bytes]:
        random = np.random.RandomState(index)
        if self.size:
            return {"__key__": f"k{index:07d}".encode(), self.field: random.bytes(self.size)}
        side = JPEG_SIDE // 8  # coarse, then made larger: smooth, like a photograph
        coarse = random.randint(0, 255, (side, side, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=90)
        return {"__key__": f"k{index:07d}".encode(), self.field: out.getvalue()}


KINDS = (
    Records("text 2 KB", "txt", 16_000, 1000, 2_000),
    Records("raw 100 KB", "bin", 2_000, 250, 100_000),
    Records("JPEG to tensors", "jpg", 1_000, 100, 0),
)


def to_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(decode_image(data)).permute(2, 0, 1).contiguous()


def ours_raw(fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
    return {"data": next(iter(fields.values()))}


def ours_jpeg(fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
    return {"data": to_tensor(fields["jpg"])}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    data = [s["data"] for s in samples]
    return {"data": torch.stack(data) if isinstance(data[0], Tensor) else data}


def ours(folder: Path, kind: Records, workers: int) -> StreamLoader:
    source = Source.open(str(folder))
    assert source is not None
    geometry = Geometry(source.total, BATCH)
    decode = ours_raw if kind.size else ours_jpeg
    spec = StreamSpec(source.shards, source.locate, OrderSettings(window=0), geometry, decode, collate)
    return StreamLoader(
        spec, source.fingerprint, num_workers=workers, start_method="fork" if workers else None
    )


def theirs(folder: Path, kind: Records, workers: int, shuffle: bool = True) -> Iterable[dict[str, Any]]:
    import webdataset as wds

    field, decode = kind.field, (lambda data: data) if kind.size else to_tensor
    shards = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(shards, shardshuffle=len(shards) if shuffle else False, seed=0)
    if shuffle:
        stream = stream.shuffle(BUFFER)
    stream = stream.map(lambda s: {"key": s["__key__"], "data": decode(s[field])}).batched(
        BATCH, collation_fn=collate
    )
    context = "fork" if workers else None
    loader: Iterable[dict[str, Any]] = wds.WebLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    return loader


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def one_pass(make: Callable[[], Iterable[dict[str, Any]]], count: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of a whole pass, starting and ending of workers included."""
    begin, used = time.perf_counter(), cpu_seconds()
    seen = sum(len(batch["data"]) for batch in make())
    assert seen >= count, f"read {seen} of {count}"
    return time.perf_counter() - begin, cpu_seconds() - used


def measure_throughput(root: Path, kind: Records) -> list[dict[str, Any]]:
    """Interleaved repeats, so that what else the machine does hits both alike; the first is not counted."""
    rows = []
    folder = root / kind.field / "train"
    for workers in (0, 1, 2):
        rounds = []
        for _ in range(REPEATS + 1):
            mine = one_pass(lambda: ours(folder, kind, workers), kind.count)  # noqa: B023
            rounds.append((mine, one_pass(lambda: theirs(folder, kind, workers), kind.count)))  # noqa: B023
        (ours_times, their_times), ratios = (
            zip(*rounds[1:], strict=True),
            [b[0] / a[0] for a, b in rounds[1:]],
        )
        rows.append(
            {
                "records": kind.name,
                "workers": workers,
                "load": os.getloadavg()[0],
                "ours": [kind.count / seconds for seconds, _ in ours_times],
                "webdataset": [kind.count / seconds for seconds, _ in their_times],
                "ratios": ratios,
                "median_ratio": statistics.median(ratios),
                "median_cpu_ratio": statistics.median(b[1] / a[1] for a, b in rounds[1:]),
            }
        )
    return rows


def stateful(folder: Path, kind: Records) -> Any:
    """The resumable loader of torchdata over webdataset's reader, as its documentation sets it up."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(theirs(folder, kind, 0).pipeline[0].dataset, batch_size=None, num_workers=0)  # type: ignore[attr-defined]


def measure_resume(root: Path) -> dict[str, Any]:
    """Seconds from making a loader to its first batch at 90 % of an epoch, from a saved state."""
    kind, folder = KINDS[0], root / KINDS[0].field / "train"
    place = int(0.9 * kind.count) // BATCH * BATCH
    reached = stateful(folder, kind)
    for _ in itertools.islice(reached, place // BATCH):
        pass
    their_state, my_state = reached.state_dict(), ours(folder, kind, 0).state_dict() | {"consumed": place}
    mine: list[float] = []
    rival: list[float] = []
    for _ in range(REPEATS):
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


def measure_indexing(root: Path, kind: Records) -> dict[str, Any]:
    """Indexing one large shard with its checksum against reading it once, `cat` to nowhere; one process.

    Cold: the page cache was told to forget the shard before each of the two.
    """
    write_shards(root / "large", kind.field, kind, shard_size=kind.count, progress=False)
    (shard,) = (root / "large" / kind.field).glob("*.tar")
    row: dict[str, Any] = {"records": kind.name, "bytes": shard.stat().st_size}
    for state in ("warm", "cold"):
        pairs, used = [], time.process_time()
        for _ in range(REPEATS):
            times = []
            for work in (
                partial(build_index, shard),
                partial(subprocess.run, ["cat", shard], stdout=subprocess.DEVNULL, check=True),
            ):
                if state == "cold":
                    forget(shard)
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
            pairs.append(times)
        row[state] = {
            "index_seconds": [a for a, _ in pairs],
            "index_cpu_seconds": (time.process_time() - used) / REPEATS,  # `cat` runs in a process of its own
            "cat_seconds": [b for _, b in pairs],
            "median_share_of_cat": statistics.median(b / a for a, b in pairs),
        }
    return row


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


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


def show(results: dict[str, Any]) -> None:
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
    if resume := results.get("resume"):
        console.print(f"resume at 90 %: {resume['median_share']:.2%} of StatefulDataLoader's time")
    for row in results.get("indexing", []):
        for state in ("warm", "cold"):
            speed = row["bytes"] / statistics.median(row[state]["index_seconds"]) / 1e6
            share, used = (
                row[state]["median_share_of_cat"],
                row["bytes"] / row[state]["index_cpu_seconds"] / 1e6,
            )
            console.print(
                f"indexing {row['records']}, {state} cache: {speed:.0f} MB/s, {share:.0%} of cat; {used:.0f} MB per "
                "CPU second"
            )
    if order := results.get("order"):
        console.print(
            f"order of 1e8 samples: built in {order['build_seconds']:.2f} s, {order['peak_bytes'] / 1e6:.0f} MB, "
            f"{order['median_batch_seconds'] * 1e6:.0f} us per batch of {BATCH}"
        )


def configuration() -> dict[str, Any]:
    return {
        **{name: version(name) for name in ("webdataset", "torchdata", "torch")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "batch": BATCH,
        "repeats": REPEATS,
        "records": [vars(kind) for kind in KINDS],
    }


def put(results: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Replace a kind's rows, keep the others'."""
    names = {row["records"] for row in rows}
    results[part] = [row for row in results.get(part, []) if row["records"] not in names] + rows


def main() -> None:
    """Measure, print tables, write ``benchmarks/results/stream.json`` after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", choices=[kind.field for kind in KINDS], help="only this kind of records")
    parser.add_argument(
        "--part", choices=["throughput", "indexing", "resume", "order"], help="only this part"
    )
    part = parser.parse_args().part
    kinds = [kind for kind in KINDS if parser.parse_args().records in (None, kind.field)]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("configuration") != (now := json.loads(json.dumps(configuration()))):
        results = {"configuration": now}
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind in kinds:
            write_shards(root / kind.field, "train", kind, shard_size=kind.shard_size, progress=False)
            if part in (None, "throughput"):
                put(results, "throughput", measure_throughput(root, kind))
            if part in (None, "indexing"):
                put(results, "indexing", [measure_indexing(root, kind)])
            if part in (None, "resume") and kind is KINDS[0]:
                results["resume"] = measure_resume(root)
            if part in (None, "order") and kind is KINDS[0]:
                results["order"] = measure_order()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
