"""Work on many files side by side, in processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from datamodules.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


def map_files(work: Callable[[T], R], jobs: Sequence[T], workers: int, *, at_a_time: int = 1) -> Iterator[R]:
    """Results in the order of the jobs; with one worker or job, in this process.

    Args:
        work: picklable.
        jobs: what to call it with.
        workers: processes.
        at_a_time: jobs that a process is given together; more where each takes little time.

    Raises:
        DataError: a process was killed.
    """
    if workers < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    context = get_context("spawn")  # forking is unsafe beside the threads of a progress bar
    count = min(workers, len(jobs))
    with ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent) as pool:
        try:
            # Ctrl-C reaches all processes of a terminal: the parent alone reports it.
            with born_without({signal.SIGINT}):
                found = pool.map(work, jobs, chunksize=at_a_time)
            yield from found
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {count} worker processes was killed, most likely for lack of memory; expected all to end by "
                "themselves; try fewer --workers: what is finished is kept"
            ) from error


@contextmanager
def born_without(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Processes started inside are born with these signals blocked; what comes for us meanwhile comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Leave when the parent is gone, SIGKILL included.

    torch's own watch misses that under the fork server, and the workers of an executor have none.
    """
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
