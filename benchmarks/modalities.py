"""Clips, captioned pictures and mixtures: loaders against webdataset on the same shards, a mixture against its parts.

Claims: the video and paired loaders reach at least 0.9 times the speed of plain webdataset that makes the same
tensors from the same shards; a mixture costs at most 5 % more than its parts run alone, weighted by how often each
is drawn.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules import (
    ImageDataModule,
    MixtureDataModule,
    PairedDataModule,
    TextDataModule,
    VideoDataModule,
)
from datamodules.base import ShardDataModule
from datamodules.sources import image, paired, text, video

RESULTS = Path(__file__).parent / "results" / "modalities.json"
BATCH, BUFFER, FRAMES = 16, 1000, 8
SAMPLES = {"image": 960, "video": 320, "paired": 960, "text": 960}
WEIGHTS = {"image": 2, "video": 2, "paired": 3, "text": 3}

Loader = Iterable[dict[str, Any]]


def prepare(root: Path) -> None:
    for name, source in (("image", image), ("video", video), ("paired", paired)):
        source.prepare("digits", root / name, train=SAMPLES[name], val=0, test=0, shard_size=200)
    text.prepare("stdlib", root / "text", train=SAMPLES["text"], val=0, test=0, shard_size=200)


def parts(root: Path, workers: int = 0) -> dict[str, ShardDataModule]:
    pixels: dict[str, Any] = {"size": 64, "channels": 1, "num_workers": workers}
    return {
        "image": ImageDataModule(root / "image", BATCH, targets="digit_text", **pixels),
        "video": VideoDataModule(root / "video", BATCH, targets="digit_text", frames=FRAMES, **pixels),
        "paired": PairedDataModule(root / "paired", BATCH, **pixels),
        "text": TextDataModule(root / "text", BATCH, num_workers=workers),
    }


# Plain webdataset, written as its users write it, to the same tensors -------------------------------------


def grey(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        return torch.from_numpy(np.array(picture.convert("L")))[None]


def read_clip(sample: dict[str, Any]) -> dict[str, Any]:
    names = sorted(name for name in sample if name.endswith(".png"))
    start = np.random.randint(len(names) - FRAMES + 1)
    digits = "".join(map(str, json.loads(sample["digits.json"])))
    return {
        "pixels": torch.stack([grey(sample[n]) for n in names[start : start + FRAMES]]),
        "targets": torch.tensor([*digits.encode(), 256]),
        "labels": torch.from_numpy(
            np.load(io.BytesIO(sample["patches.npy"]))[start : start + FRAMES].astype(np.int64)
        ),
    }


def read_pair(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "pixels": grey(sample["png"]),
        "targets": torch.tensor([*sample["txt"], 256]),
        "question": torch.tensor([*sample["question.txt"]]),
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "pixels": (torch.stack([s["pixels"] for s in samples]).float() / 255 - 0.5) / 0.5,
        "targets": pad_sequence([s["targets"] for s in samples], batch_first=True, padding_value=-100),
    }
    if "labels" in samples[0]:
        batch["labels"] = torch.stack([s["labels"] for s in samples])
    if "question" in samples[0]:
        batch["question"] = pad_sequence([s["question"] for s in samples], batch_first=True)
    return batch


def webdataset(folder: Path, read: Callable[[dict[str, Any]], dict[str, Any]], workers: int) -> Loader:
    import webdataset as wds

    shards = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(BUFFER)
    stream = stream.map(read).batched(BATCH, collation_fn=collate)
    context = "fork" if workers else None
    loader: Loader = wds.WebLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    return loader


# Measurements ----------------------------------------------------------------------------------------------


def seconds(loader: Loader, workers: int = 0) -> float:
    """Time of a whole pass, starting of workers included.

    In one process it is CPU time, which other work on the machine does not change; workers' time is wall time.
    """
    clock = time.perf_counter if workers else time.process_time
    begin = clock()
    for _ in loader:
        pass
    return clock() - begin


def against_webdataset(root: Path, repeats: int) -> list[dict[str, Any]]:
    """Interleaved repeats, so that what else the machine does hits both alike."""
    readers = {"video": read_clip, "paired": read_pair}
    rows = []
    for name, read in readers.items():
        for workers in (0, 1, 2):
            data = parts(root, workers)[name]
            pairs = []
            for _ in range(repeats):
                mine = seconds(data.train_dataloader(), workers)
                pairs.append((mine, seconds(webdataset(root / name / "train", read, workers), workers)))
            rates = [(SAMPLES[name] / a, SAMPLES[name] / b) for a, b in pairs]
            ratios = [a / b for a, b in rates]
            rows.append(
                {
                    "loader": name,
                    "workers": workers,
                    "ours_per_second": [a for a, _ in rates],
                    "webdataset_per_second": [b for _, b in rates],
                    "ratios": ratios,
                    "median_ratio": statistics.median(ratios),
                }
            )
    return rows


def endless(loader: Loader) -> Iterator[dict[str, Any]]:
    """Pass after pass, as a mixture reads a part."""
    while True:
        yield from loader


def mixture_against_parts(root: Path, repeats: int, cycles: int = 6) -> dict[str, Any]:
    """One mixture's batches against the same numbers of batches from each part alone, in the same process."""
    mixture = MixtureDataModule(dict(parts(root)), dict(WEIGHTS))
    cycle = len(mixture.turns)
    rows: list[dict[str, Any]] = []
    for _ in range(repeats):
        alone = {}
        for name, part in parts(root).items():
            loader = endless(part.endless_dataloader())
            next(loader)
            alone[name] = seconds(islice(loader, WEIGHTS[name] * cycles)) / (WEIGHTS[name] * cycles)
        batches: Iterator[dict[str, Any]] = iter(mixture.train_dataloader())
        for _ in range(cycle):
            next(batches)  # every part has begun
        mixed = seconds(islice(batches, cycle * cycles)) / (cycle * cycles)
        weighted = sum(WEIGHTS[n] * t for n, t in alone.items()) / cycle
        rows.append({"alone": alone, "mixed": mixed, "weighted": weighted, "ratio": mixed / weighted})
    return {
        "seconds_per_batch": rows,
        "median_cost_over_weighted_parts": statistics.median(r["ratio"] for r in rows),
        "median_cost_over_slowest_part": statistics.median(
            r["mixed"] / max(r["alone"].values()) for r in rows
        ),
    }


def show(results: dict[str, Any]) -> None:
    table = Table("loader", "workers", "ours, samples/s", "webdataset", "ratio (median)", "least..most")
    for row in results["webdataset"]:
        table.add_row(
            row["loader"],
            str(row["workers"]),
            f"{statistics.median(row['ours_per_second']):.0f}",
            f"{statistics.median(row['webdataset_per_second']):.0f}",
            f"{row['median_ratio']:.2f}",
            f"{min(row['ratios']):.2f}..{max(row['ratios']):.2f}",
        )
    console, mixture = Console(width=110), results["mixture"]
    console.print(table)
    console.print(
        f"a batch of the mixture takes {mixture['median_cost_over_weighted_parts']:.3f} times the weighted mean of its "
        f"parts alone, {mixture['median_cost_over_slowest_part']:.3f} times its slowest part"
    )


def main() -> None:
    """Measure, print, write ``benchmarks/results/modalities.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        configuration = {
            "webdataset": version("webdataset"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "load_at_start": os.getloadavg(),
            "batch": BATCH,
            "repeats": repeats,
            "samples": SAMPLES,
            "weights": WEIGHTS,
        }
        results = {
            "configuration": configuration,
            "webdataset": against_webdataset(root, repeats),
            "mixture": mixture_against_parts(root, repeats),
        }
    configuration["load_at_end"] = os.getloadavg()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
