"""Work on many files side by side, in processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_files(work: Callable[[T], R], jobs: Sequence[T], workers: int) -> Iterator[R]:
    """Results in the order of the jobs; with one worker or job, in this process."""
    if workers < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    context = get_context("spawn")  # forking is unsafe beside the threads of a progress bar
    count = min(workers, len(jobs))
    with ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent) as pool:
        yield from pool.map(work, jobs)


def end_with_parent() -> None:
    """Leave when the parent is gone, SIGKILL included.

    torch's own watch misses that under the fork server, and the workers of an executor have none.
    """
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
