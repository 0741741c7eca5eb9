"""The loader: whole batches in order, from any position on, and one integer of state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.errors import DataError
from datamodules.shards.faults import Fault, FaultPolicy
from datamodules.shards.geometry import Progress
from datamodules.shards.order import OrderSettings
from datamodules.shards.processes import born_without
from datamodules.shards.stream import Batch, BatchStream, StreamSpec, unpack_places
from datamodules.shards.worker_signals import FOR_THE_TRAINING, leave_to_training

log = logging.getLogger(__name__)

_VERSION = 1
_UNKNOWN = -1  # consumed, in a state saved while nobody reported what was trained

Agree = Callable[[int, int], tuple[int, int]]
"""Sums (bad samples, failures) over all ranks; every rank calls it once per batch."""


class StreamLoader:
    """Iterates over this rank's batches of an epoch; resumes at any sample.

    A plain iterable with a length, which makes Lightning take it as it is and fetch no batch ahead. Its state
    is the position of the last batch that was *trained*, which the `ExactResume` callback reports through
    `commit`, not of the last one handed out. Iterating starts nothing before the first batch is asked for.

    Args:
        spec: what to stream.
        fingerprint: of the shards; a state of other shards is refused.
        num_workers: worker processes; 0 = in this process.
        start_method: `fork`, `spawn` or `forkserver`; `None`: the platform's.
        persistent_workers: keep workers from one epoch to the next.
        prefetch: batches that each worker makes ahead.
        pin_memory: copy batches to page-locked memory, for faster transfers to a GPU.
        policy: what to do about bad samples.
        training: False = every pass is the whole of epoch 0, as an evaluation wants it.
        agree: sums fault counts over ranks, so that all stop at the same batch; `None`: one rank.

    Raises:
        DataError: fewer than 0 workers, or than 1 batch ahead.
    """

    batch_sampler = None  # Lightning reads it wherever it reads `sampler`

    def __init__(
        self,
        spec: StreamSpec,
        fingerprint: str,
        *,
        num_workers: int = 0,
        start_method: str | None = None,
        persistent_workers: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
        policy: FaultPolicy | None = None,
        training: bool = True,
        agree: Agree | None = None,
    ) -> None:
        if num_workers < 0 or prefetch < 1:
            raise DataError(
                f"num_workers is {num_workers} and prefetch {prefetch}, expected at least 0 and 1; num_workers=0 reads "
                "in the training process"
            )
        self.policy = policy or FaultPolicy()
        self._spec = replace(spec, stop_at_fault=self.policy.on_error == "raise")
        self._fingerprint, self._training, self._agree = fingerprint, training, agree
        self._keep_workers = persistent_workers and num_workers > 0
        self._worker_options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            self._worker_options |= {
                "persistent_workers": persistent_workers,
                "prefetch_factor": prefetch,
                "multiprocessing_context": start_method,
                "worker_init_fn": leave_to_training(),
            }
        self._kept: tuple[DataLoader[Batch], Tensor] | None = None
        self._start = Progress(0, 0)
        self._trained = Progress(0, 0)
        self._lap = (0, 0)  # tail "carry": the trainer's epoch, and the absolute position where it began
        self._watched = False
        self._bad = 0
        self.resumed = False
        self.before_state: Callable[[], None] | None = None

    # What Lightning's loops look at ---------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of a full epoch, also after a resume: the trainer counts on from where it was."""
        return self._spec.geometry.batches

    @property
    def sampler(self) -> StreamLoader:
        """Itself: where a trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the one that a state was loaded for; does nothing in evaluation."""
        if not self._training:
            return
        if self._spec.geometry.tail == "carry":
            if epoch != self._lap[0]:
                self._lap = (epoch, self._absolute(self._start))
        elif epoch != self._start.epoch:
            self._start = self._trained = Progress(epoch, 0)

    # Position -------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The trainer's epoch that the position belongs to."""
        return self._lap[0] if self._spec.geometry.tail == "carry" else self._start.epoch

    @property
    def batches_done(self) -> int:
        """Batches of the present geometry that the position amounts to, in the trainer's present epoch."""
        geometry = self._spec.geometry
        if geometry.tail == "carry":
            return min((self._absolute(self._start) - self._lap[1]) // geometry.step, geometry.batches)
        return geometry.batches - geometry.remaining(max(0, self._start.consumed))

    @property
    def total(self) -> int:
        """Samples in an epoch, over all ranks."""
        return self._spec.geometry.total

    def samples_in(self, batches: int) -> int:
        """Samples of an epoch's first batches, over all ranks."""
        return min(self.total, batches * self._spec.geometry.step)

    def commit(self, progress: tuple[int, int]) -> None:
        """Take a batch as trained: a state saved from now on continues behind it.

        Args:
            progress: the batch's `progress`, after its optimizer step was applied.
        """
        self._trained, self._watched = Progress(*progress), True

    def watch(self, before_state: Callable[[], None]) -> None:
        """Announce that trained batches will be committed.

        Args:
            before_state: called before a state is taken, to commit what is due.
        """
        self.before_state, self._watched = before_state, True

    def _absolute(self, progress: Progress) -> int:
        return progress.epoch * self.total + progress.consumed

    # State ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position and identity, in plain types, the same on every rank.

        Returns:
            `epoch` and `consumed` (samples of it that were trained; -1 if nobody reported that),
            `fingerprint`, `samples`, `shards`, `order`, `tail`, `lap`, and for information `world` and
            `batch`.
        """
        if self.before_state is not None:
            self.before_state()
        geometry, (epoch, consumed) = self._spec.geometry, self._trained
        return {
            "version": _VERSION,
            "epoch": epoch,
            "consumed": consumed,
            "fingerprint": self._fingerprint,
            "samples": geometry.total,
            "shards": len(self._spec.shards),
            "order": self._spec.settings_of(epoch).state(),
            "tail": geometry.tail,
            "lap": list(self._lap),
            "world": geometry.world,
            "batch": geometry.batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken; ranks, workers and batch size may be others.

        Order settings of the state hold until its epoch ends; changed ones apply from the next epoch.

        Raises:
            DataError: the shards are not the same, or the state is of another version.
        """
        self._check(state)
        order = OrderSettings(**state["order"])
        pinned = None
        if order != self._spec.settings:
            pinned = (int(state["epoch"]), order)
            log.info(
                "order settings changed; epoch %d is finished with the checkpoint's: %s", pinned[0], order
            )
        if pinned != self._spec.pinned:
            self.close()
            self._spec = replace(self._spec, pinned=pinned)
        self._start = self._trained = Progress(int(state["epoch"]), int(state["consumed"]))
        lap_epoch, lap_start = state["lap"]
        self._lap = (int(lap_epoch), int(lap_start))
        if state["tail"] != "carry" == self._spec.geometry.tail:
            self._lap = (self._start.epoch, self._start.epoch * self.total)
        self.resumed = True

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise DataError(
                f"the checkpoint's data state has version {state.get('version')}, expected {_VERSION}: "
                "resume with the release that wrote it"
            )
        if state["fingerprint"] != self._fingerprint:
            then = f"{state['samples']} samples in {state['shards']} shards ({state['fingerprint']})"
            now = f"{self.total} in {len(self._spec.shards)} ({self._fingerprint})"
            raise DataError(
                f"the shards changed since this checkpoint: it saw {then}, now there are {now}; restore the "
                "shards, or start a new run from its weights"
            )

    # Iteration ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from the start position on.

        Raises:
            DataError: bad samples beyond the budget, on this rank or another, before the batch is handed out.
        """
        start, geometry = self._begin(), self._spec.geometry
        last = geometry.remaining(start.consumed) - 1
        batches = self._batches(start)
        number = 0
        while (batch := self._next(batches)) is not None:
            if self._training and geometry.tail == "carry":
                self._start = Progress(*batch["progress"])
            elif self._training and number == last:
                self._start = Progress(start.epoch + 1, 0)
            if not self._watched:
                self._trained = Progress(start.epoch, _UNKNOWN)
            number += 1
            yield batch

    def _begin(self) -> Progress:
        if self._start.consumed == _UNKNOWN:
            raise DataError(
                "the checkpoint was made in the middle of an epoch without the exact-resume callback, so its "
                "position is unknown; use Trainer(callbacks=datamodule.callbacks()), or resume a checkpoint "
                "from the end of an epoch"
            )
        self._bad = 0
        return self._start

    def _batches(self, start: Progress) -> Iterator[Batch]:
        if self._kept is None:
            position = torch.zeros(2, dtype=torch.int64)
            position.share_memory_()  # type: ignore[no-untyped-call]
            loader: DataLoader[Batch] = DataLoader(
                BatchStream(self._spec, position),
                batch_size=None,
                collate_fn=_as_is,
                generator=torch.Generator(),  # the default one would draw from the global random state
                **self._worker_options,
            )
        else:
            loader, position = self._kept
        if self._keep_workers:
            self._kept = (loader, position)
        position[0], position[1] = start
        with born_without(FOR_THE_TRAINING):
            return iter(loader)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch once all ranks have theirs; None at the end."""
        batch: Batch | None = None
        problem: Exception | None = None
        try:
            batch = next(batches)
        except StopIteration:
            if self._bad:
                log.warning("%s", self.policy.summary(self._bad, self.total))
            return None
        except Exception as error:  # a dead worker, a bug in collate: the other ranks must hear of it
            problem = error
        faults: list[Fault] = batch.pop("faults", []) if batch else []
        for fault in faults:
            log.warning("bad sample: %s", fault)
        bad, failures = len(faults), int(problem is not None)
        if self._agree is not None:
            bad, failures = self._agree(bad, failures)
        self._bad += bad
        if problem is not None:
            raise problem
        if failures:
            raise DataError("reading data failed on another rank, so all ranks stop; its log has the reason")
        if self._bad > self.policy.allowed(self.total):
            raise self.policy.verdict(self._bad, self.total, faults[-1] if faults else None)
        if batch is not None:
            unpack_places(batch, pin=self._worker_options["pin_memory"] and torch.accelerator.is_available())
        return batch

    def close(self) -> None:
        """Stop kept workers; iterating again starts new ones."""
        self._kept = None


def _as_is(batch: Any) -> Any:
    return batch
