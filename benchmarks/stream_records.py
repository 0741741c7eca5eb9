"""What the stream's benchmark reads: made-up samples, and three loaders over the same shards."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.shards.decode import decode_image
from datamodules.shards.geometry import Geometry
from datamodules.shards.loader import StreamLoader
from datamodules.shards.order import OrderSettings
from datamodules.shards.source import Source
from datamodules.shards.stream import StreamSpec

BATCH, BUFFER, JPEG_SIDE = 32, 1000, 224


@dataclass(frozen=True)
class Records:
    """Made-up samples of one kind.

    Attributes:
        name: shown in the table.
        field: extension.
        count: samples.
        shard_size: samples per shard.
        size: bytes of a sample; 0 = a JPEG.
        indexed: samples of the one large shard that is indexed.
    """

    name: str
    field: str
    count: int
    shard_size: int
    size: int
    indexed: int

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
    Records("text 2 KB", "txt", 16_000, 1000, 2_000, 100_000),
    Records("raw 100 KB", "bin", 2_000, 250, 100_000, 2_500),
    Records("JPEG to tensors", "jpg", 4_000, 100, 0, 5_000),
)


def to_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(decode_image(data)).permute(2, 0, 1).contiguous()


def _raw(fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
    return {"data": next(iter(fields.values()))}


def _jpeg(fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
    return {"data": to_tensor(fields["jpg"])}


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    data = [s["data"] for s in samples]
    return {"data": torch.stack(data) if isinstance(data[0], Tensor) else data}


def ours(folder: Path, kind: Records, workers: int) -> StreamLoader:
    """This project's loader; shuffles all of the epoch."""
    source = Source.open(str(folder))
    assert source is not None
    decode = _raw if kind.size else _jpeg
    geometry = Geometry(source.total, BATCH)
    spec = StreamSpec(source.shards, source.locate, OrderSettings(window=0), geometry, decode, _collate)
    return StreamLoader(
        spec, source.fingerprint, num_workers=workers, start_method="fork" if workers else None
    )


def _webdataset(folder: Path, kind: Records) -> Any:
    import webdataset as wds

    field, decode = kind.field, (lambda data: data) if kind.size else to_tensor
    shards = sorted(map(str, folder.glob("*.tar")))
    stream = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(BUFFER)
    return stream.map(lambda s: {"key": s["__key__"], "data": decode(s[field])}).batched(
        BATCH, collation_fn=_collate
    )


def theirs(folder: Path, kind: Records, workers: int) -> Iterable[dict[str, Any]]:
    """The reader and loader of webdataset; shuffles shards, and samples in a buffer."""
    import webdataset as wds

    context = "fork" if workers else None
    loader: Iterable[dict[str, Any]] = wds.WebLoader(
        _webdataset(folder, kind), batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    return loader


def stateful(folder: Path, kind: Records) -> Any:
    """The resumable loader of torchdata over webdataset's reader, as its documentation sets it up."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(_webdataset(folder, kind), batch_size=None, num_workers=0)
