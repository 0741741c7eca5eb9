"""Data workers go on when a signal is meant for the training: it still needs batches to reach the end of its step.

torchrun, SLURM and Ctrl-C signal every process of a job. A worker that died of it would end the training with an error
before it has saved. A worker ends when its loader does, or when the process that reads from it is gone.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from functools import cache, partial
from types import FrameType

import torch
from torch import Tensor

FOR_THE_TRAINING = frozenset({signal.SIGINT, signal.SIGUSR1, signal.SIGTERM})


def leave_to_training() -> Callable[[int], None]:
    """A ``worker_init_fn``: workers ignore SIGINT, SIGUSR1, and SIGTERM until this process is about to end.

    They are to be started with these signals blocked, so that none comes before this runs.
    """
    return partial(_ignore, _ending(os.getpid()))


@cache
def _ending(process: int) -> Tensor:
    """A shared flag that this process sets when it ends: multiprocessing's own SIGTERM is then obeyed."""
    ending = torch.zeros(1, dtype=torch.bool)
    ending.share_memory_()  # type: ignore[no-untyped-call]
    atexit.register(ending.fill_, True)
    return ending


def _ignore(ending: Tensor, worker: int) -> None:
    def obey_at_the_end(number: int, frame: FrameType | None) -> None:
        if ending.item():
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, obey_at_the_end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_TRAINING)
