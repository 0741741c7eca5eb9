"""What a worker does: from positions to whole batches. Picklable, so that any start method works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.errors import DataError
from datamodules.shards.buckets import LengthBuckets
from datamodules.shards.cache import ShardCache
from datamodules.shards.faults import Fault
from datamodules.shards.geometry import Geometry, Progress, Share
from datamodules.shards.hashing import Int, sample_seeds
from datamodules.shards.order import EpochOrder, Order, OrderSettings
from datamodules.shards.prefetch import Prefetcher
from datamodules.shards.processes import end_with_parent
from datamodules.shards.reader import MAX_OPEN, MAX_OPEN_CACHED, SampleReader, ShardFile

Batch = dict[str, Any]
Decode = Callable[[dict[str, bytes], str, int], dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], Batch]

_AHEAD = 2048  # positions whose places are computed together; spreads numpy's cost per call
_PLACES = "places"  # of a batch on its way from a worker
_FILLERS = 64  # neighbours to try for a sample that can stand in for a bad one


@dataclass(frozen=True)
class StreamSpec:
    """Everything a worker needs to make batches.

    Attributes:
        shards: the shards, in manifest order.
        locate: local path of a file by name.
        settings: the order of all epochs but a pinned one.
        geometry: ranks, batch size, tail.
        decode: (fields, key, seed) -> sample.
        collate: samples -> batch.
        stop_at_fault: a bad sample ends the run, so the rest of its batch need not be made.
        pinned: an epoch that was begun with other order settings and is finished with them.
    """

    shards: tuple[ShardFile, ...]
    locate: Callable[[str], Path]
    settings: OrderSettings
    geometry: Geometry
    decode: Decode
    collate: Collate
    stop_at_fault: bool = True
    pinned: tuple[int, OrderSettings] | None = None

    def settings_of(self, epoch: int) -> OrderSettings:
        """Order settings that hold in an epoch."""
        return self.pinned[1] if self.pinned and self.pinned[0] == epoch else self.settings

    def order(self, epoch: int, reader: SampleReader) -> Order:
        """The order of an epoch."""
        settings = self.settings_of(epoch)
        order = EpochOrder([s.samples for s in self.shards], settings, epoch)
        return LengthBuckets(order, reader.lengths, settings, epoch) if settings.bucket else order


def unpack_places(batch: Batch, *, pin: bool) -> None:
    """Make `valid`, `seeds` and `position` of what a worker sent, in place.

    They travel as one array: a tensor would cost a shared-memory file each, more than small samples do.
    """
    places = torch.from_numpy(batch.pop(_PLACES))
    valid, batch["seeds"], batch["position"] = (places.pin_memory() if pin else places).unbind()
    batch["valid"] = valid.bool()


class _Place(NamedTuple):
    """Where the samples of a batch lie; int64 [n] each."""

    epoch: Int
    position: Int
    shard: Int
    sample: Int
    seed: Int


class BatchStream(IterableDataset[Batch]):
    """One worker's share of a pass: the whole batches w, w + workers, ... of this rank.

    Args:
        spec: what to stream.
        start: int64 [2] in shared memory, (epoch, consumed) where the pass begins. It is read when the pass
            begins, so that workers that live on through several passes learn of the new one.
    """

    def __init__(self, spec: StreamSpec, start: Tensor) -> None:
        self._spec, self._start = spec, start
        self._reader: SampleReader | None = None
        self._orders: dict[int, Order] = {}
        self._spare: tuple[str, dict[str, Any]] | None = None
        self._prefetcher: Prefetcher | None = None
        self._guarded = False

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info is not None and not self._guarded:
            self._guarded = True
            end_with_parent()
        start, geometry = Progress(*self._start.tolist()), self._spec.geometry
        numbers = range(worker, geometry.remaining(start.consumed), workers)
        ahead = max(1, _AHEAD // geometry.batch)
        chunks = [numbers[first : first + ahead] for first in range(0, len(numbers), ahead)]
        for shares, place in self._announced(self._plan(start, chunk) for chunk in chunks):
            stop = 0
            for share in shares:
                begin, stop = stop, stop + max(1, len(share.positions))
                yield self._batch(start, share, _Place(*(column[begin:stop] for column in place)))

    def _plan(self, start: Progress, numbers: range) -> tuple[list[Share], _Place]:
        """This rank's part of some global batches, and where the samples lie."""
        shares = [self._spec.geometry.share(start, number) for number in numbers]
        # a rank without a real sample in the tail still needs one to give its batch a shape
        asked = [s.positions if len(s.positions) else np.array([s.end - 1]) for s in shares]
        return shares, self._find(np.concatenate(asked))

    def _announced(self, plans: Iterator[tuple[list[Share], _Place]]) -> Iterator[tuple[list[Share], _Place]]:
        """The plans; of a remote set each one's shards are fetched while the plan before it is read."""
        if not isinstance(self._spec.locate, ShardCache):
            yield from plans
            return
        self._prefetcher = self._prefetcher or Prefetcher(self._spec.locate)
        current = next(plans, None)
        while current is not None:
            upcoming = next(plans, None)
            soon = [shard for _, place in filter(None, (current, upcoming)) for shard in place.shard.tolist()]
            self._prefetcher.ask(self._spec.shards[shard].name for shard in dict.fromkeys(soon))
            yield current
            current = upcoming

    def _find(self, absolute: Int) -> _Place:
        epoch, position = np.divmod(absolute, self._spec.geometry.total)
        shard, sample, seed = (np.empty_like(position) for _ in range(3))
        for e in np.unique(epoch).tolist():
            at = epoch == e
            shard[at], sample[at] = self._order(e)(position[at])
            seed[at] = sample_seeds(self._spec.settings_of(e).seed, e, position[at])
        return _Place(epoch, position, shard, sample, seed)

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = self._spec.order(epoch, self._files())
        return self._orders[epoch]

    def _files(self) -> SampleReader:
        if self._reader is None:
            cached = isinstance(self._spec.locate, ShardCache)
            limit = MAX_OPEN_CACHED if cached else MAX_OPEN
            self._reader = SampleReader(self._spec.shards, self._spec.locate, limit)
        return self._reader

    def _decode(self, place: _Place) -> tuple[list[tuple[str, dict[str, Any]] | None], list[Fault]]:
        """Samples with their keys, None where one is bad, and what is bad."""
        samples: list[tuple[str, dict[str, Any]] | None] = []
        faults: list[Fault] = []
        for i, record in enumerate(self._files().read(place.shard, place.sample)):
            key, error = "", record
            if not isinstance(record, Exception):
                key = record[0]
                try:
                    samples.append((key, self._spec.decode(record[1], key, int(place.seed[i]))))
                    continue
                except Exception as problem:  # whatever a decoder raises is the sample's fault
                    error = problem
            text = str(error) if isinstance(error, DataError) else repr(error)
            shard = self._spec.shards[int(place.shard[i])].name
            faults.append(
                Fault(shard, int(place.sample[i]), key, int(place.epoch[i]), int(place.position[i]), text)
            )
            samples.append(None)
        return samples, faults

    def _batch(self, start: Progress, share: Share, place: _Place) -> Batch:
        samples, faults = self._decode(place)
        if faults and self._spec.stop_at_fault:
            return {"faults": faults}
        size, real = self._spec.geometry.batch, len(share.positions)
        filler = next((s for s in samples if s is not None), None) or self._stand_in(place, faults)
        self._spare = filler
        slots = list(islice(cycle(range(len(samples))), size))
        filled = [samples[i] or filler for i in slots]
        valid = np.array([j < real and samples[i] is not None for j, i in enumerate(slots)])
        batch = dict(self._spec.collate([sample for _, sample in filled]))
        batch["keys"] = [key for key, _ in filled]
        batch[_PLACES] = np.stack([valid, place.seed[slots], np.where(valid, place.position[slots], -1)])
        batch["progress"] = tuple(self._spec.geometry.progress(start, share.end))
        batch["weight"] = share.weight
        if faults:
            batch["faults"] = faults
        return batch

    def _stand_in(self, place: _Place, faults: list[Fault]) -> tuple[str, dict[str, Any]]:
        """A good sample for a batch that has none: the last one seen, or a neighbour."""
        if self._spare is not None:
            return self._spare
        total, epoch = self._spec.geometry.total, int(place.epoch[-1])
        ahead = epoch * total + (int(place.position[-1]) + 1 + np.arange(_FILLERS)) % total
        samples, _ = self._decode(self._find(ahead))
        if (good := next((s for s in samples if s is not None), None)) is None:
            raise DataError(
                f"no readable sample near position {place.position[0]} of epoch {epoch}; {faults[0]}"
            )
        return good
