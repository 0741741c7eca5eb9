"""The loader of a mixture: whole batches of one part after the other, resumable like its parts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from datamodules.errors import DataError
from datamodules.shards.loader import StreamLoader
from datamodules.shards.mixing import MixtureTurns
from datamodules.shards.stream import Batch

log = logging.getLogger(__name__)

_VERSION = 1


class _Handed(NamedTuple):
    """A batch that was handed out: the mixture's progress with it, and its part's."""

    progress: tuple[int, int]
    part: str
    part_progress: tuple[int, int]
    drawn: int


class MixtureLoader:
    """Iterates over batches of several streams, in the turns of a `MixtureTurns`.

    Every part is an endless stream of full batches (tail `carry`): pass by pass it shows each of its samples once.
    What a checkpoint keeps is the number of draws and each part's own position, so ranks, workers and batch sizes
    may change. All ranks draw from the same part at the same time.

    The `progress` of a batch is (epoch, batches of it consumed once this batch is trained).

    Args:
        parts: train loaders with tail `carry`, by name.
        turns: whose turn it is.
        batches: batches of an epoch.
    """

    batch_sampler = None  # Lightning reads it wherever it reads `sampler`

    def __init__(self, parts: Mapping[str, StreamLoader], turns: MixtureTurns, batches: int) -> None:
        self._parts, self._turns, self._batches = dict(parts), turns, batches
        self._names = list(self._parts)
        self._iterators: dict[str, Iterator[Batch]] = {}
        self._handed: deque[_Handed] = deque()
        self._drawn = self._trained = 0
        self._lap = (0, 0)  # the trainer's epoch, and the draw that it began with
        self.resumed = False
        self.before_state: Callable[[], None] | None = None

    def __len__(self) -> int:
        """Batches of a full epoch, also after a resume: the trainer counts on from where it was."""
        return self._batches

    @property
    def sampler(self) -> MixtureLoader:
        """Itself: where a trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the one that a state was loaded for; the parts go on where they are."""
        if epoch != self._lap[0]:
            self._lap = (epoch, self._drawn)

    @property
    def epoch(self) -> int:
        """The trainer's epoch that the position belongs to."""
        return self._lap[0]

    @property
    def batches_done(self) -> int:
        """Batches of the trainer's present epoch that are done."""
        return min(self._drawn - self._lap[1], self._batches)

    @property
    def total(self) -> int:
        """Samples of one pass through every part, over all ranks."""
        return sum(part.total for part in self._parts.values())

    # Position and state ---------------------------------------------------------------------------------

    def watch(self, before_state: Callable[[], None]) -> None:
        """Announce that trained batches will be committed; see `StreamLoader.watch`."""
        self.before_state = before_state
        for part in self._parts.values():
            part.watch(_nothing)

    def commit(self, progress: tuple[int, int]) -> None:
        """Take all batches up to the one with this progress as trained."""
        while self._handed:
            handed = self._handed.popleft()
            self._parts[handed.part].commit(handed.part_progress)
            self._trained = handed.drawn
            if handed.progress == tuple(progress):
                return

    def state_dict(self) -> dict[str, Any]:
        """Draws, and each part's position and identity, in plain types, the same on every rank."""
        if self.before_state is not None:
            self.before_state()
        return {
            "version": _VERSION,
            "drawn": self._trained,
            "lap": list(self._lap),
            "draws": dict(zip(self._names, self._turns.counts, strict=True)),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken; changed weights hold from the next batch on.

        Raises:
            DataError: the parts are others, or their shards changed.
        """
        found = state.get("parts", {})
        if state.get("version") != _VERSION or list(found) != self._names:
            raise DataError(
                f"the checkpoint holds the data position of the parts {', '.join(found) or 'none'}, now there are "
                f"{', '.join(self._names)}; give the same parts in the same order, or start a new run from its weights"
            )
        if (now := dict(zip(self._names, self._turns.counts, strict=True))) != state["draws"]:
            log.info("mixture weights changed from %s to %s: from the next batch on", state["draws"], now)
        for name, part in self._parts.items():
            part.load_state_dict(found[name])
        self._iterators.clear()
        self._handed.clear()
        self._drawn = self._trained = int(state["drawn"])
        self._lap = (int(state["lap"][0]), int(state["lap"][1]))
        self.resumed = True

    # Iteration ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of this rank's batches of the epoch; each has the key `modality`, its part's name."""
        for _ in range(self._batches - self.batches_done):
            name = self._names[self._turns(self._drawn)]
            batch = self._next(name)
            self._drawn += 1
            progress = (self._lap[0], self._drawn - self._lap[1])
            self._handed.append(_Handed(progress, name, batch["progress"], self._drawn))
            batch["progress"] = progress
            yield batch

    def _next(self, name: str) -> Batch:
        if name in self._iterators:
            batch = next(self._iterators[name], None)
            if batch is not None:
                return batch
        self._iterators[name] = iter(self._parts[name])  # another pass; a part never ends for good
        return next(self._iterators[name])

    def close(self) -> None:
        """Stop the parts' workers; iterating again starts new ones."""
        self._iterators.clear()
        for part in self._parts.values():
            part.close()


def _nothing() -> None:
    """The mixture commits for its parts."""
