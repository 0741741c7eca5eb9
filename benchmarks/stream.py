"""The stream against webdataset's own reader on the same shards, in ratios taken in one run.

Claims: at least webdataset's speed with 0, 1 and 2 workers, for 2 KB texts, 100 KB records and JPEGs decoded to
tensors, although ours shuffles fully and webdataset through a buffer of 1000; a resume at 90 % of an epoch costs
under 2 % of what StatefulDataLoader needs; the order of 1e8 samples costs under 1 GB and under 1 ms per batch.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
BATCH, REPEATS, BUFFER, JPEG_SIDE = 32, 7, 1000, 224


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
    Records("text 2 KB", "txt", 20_000, 1000, 2_000),
    Records("raw 100 KB", "bin", 3_000, 250, 100_000),
    Records("JPEG to tensors", "jpg", 2_000, 200, 0),
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


def rate(make: Callable[[], Iterable[dict[str, Any]]], count: int) -> float:
    """Samples per second of a whole pass, starting of workers included."""
    begin = time.perf_counter()
    seen = sum(len(batch["data"]) for batch in make())
    assert seen >= count, f"read {seen} of {count}"
    return count / (time.perf_counter() - begin)


def measure_throughput(root: Path) -> list[dict[str, Any]]:
    """Interleaved repeats, so that what else the machine does hits both alike."""
    rows = []
    for kind, workers in itertools.product(KINDS, (0, 1, 2)):
        folder = root / kind.field / "train"
        pairs = []
        for _ in range(REPEATS):
            mine = rate(lambda: ours(folder, kind, workers), kind.count)  # noqa: B023
            pairs.append((mine, rate(lambda: theirs(folder, kind, workers), kind.count)))  # noqa: B023
        ratios = [a / b for a, b in pairs]
        rows.append(
            {
                "records": kind.name,
                "workers": workers,
                "ours": [a for a, _ in pairs],
                "webdataset": [b for _, b in pairs],
                "ratios": ratios,
                "median_ratio": statistics.median(ratios),
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


def measure_indexing(root: Path) -> list[dict[str, Any]]:
    """Indexing with checksums against reading the same bytes once, `cat` to nowhere; warm cache, one process."""
    rows = []
    for kind in KINDS:
        shards = sorted((root / kind.field / "train").glob("*.tar"))
        size = sum(path.stat().st_size for path in shards)
        pairs = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            for path in shards:
                build_index(path)
            middle = time.perf_counter()
            subprocess.run(["cat", *shards], stdout=subprocess.DEVNULL, check=True)
            pairs.append((middle - begin, time.perf_counter() - middle))
        rows.append(
            {
                "records": kind.name,
                "bytes": size,
                "index_seconds": [a for a, _ in pairs],
                "cat_seconds": [b for _, b in pairs],
                "median_share_of_cat": statistics.median(b / a for a, b in pairs),
            }
        )
    return rows


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
        "records", "workers", "ours, samples/s", "webdataset, samples/s", "ratio (median)", "least..most"
    )
    for row in results["throughput"]:
        table.add_row(
            row["records"],
            str(row["workers"]),
            f"{statistics.median(row['ours']):.0f}",
            f"{statistics.median(row['webdataset']):.0f}",
            f"{row['median_ratio']:.2f}",
            f"{min(row['ratios']):.2f}..{max(row['ratios']):.2f}",
        )
    console = Console(width=110)
    console.print(table)
    resume, order = results["resume"], results["order"]
    console.print(f"resume at 90 %: {resume['median_share']:.2%} of StatefulDataLoader's time")
    for row in results["indexing"]:
        speed = row["bytes"] / statistics.median(row["index_seconds"]) / 1e6
        console.print(f"indexing {row['records']}: {speed:.0f} MB/s, {row['median_share_of_cat']:.0%} of cat")
    console.print(
        f"order of 1e8 samples: built in {order['build_seconds']:.2f} s, {order['peak_bytes'] / 1e6:.0f} MB, "
        f"{order['median_batch_seconds'] * 1e6:.0f} us per batch of {BATCH}"
    )


def main() -> None:
    """Measure, print tables, write ``benchmarks/results/stream.json``."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind in KINDS:
            write_shards(root / kind.field, "train", kind, shard_size=kind.shard_size, progress=False)
        results = {
            "configuration": {
                "webdataset": version("webdataset"),
                "torchdata": version("torchdata"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "load_at_start": os.getloadavg(),
                "batch": BATCH,
                "repeats": REPEATS,
                "records": [vars(kind) for kind in KINDS],
            },
            "throughput": measure_throughput(root),
            "resume": measure_resume(root),
            "indexing": measure_indexing(root),
            "order": measure_order(),
        }
        results["configuration"]["load_at_end"] = os.getloadavg()  # type: ignore[index]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
