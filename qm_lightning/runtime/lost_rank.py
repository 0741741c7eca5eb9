"""What a collective says when a rank is gone, in words that help."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

from qm_lightning.runtime.collective_timeout import TIMEOUT_VARIABLE, collective_timeout
from qm_lightning.runtime.world import resolve_world

EXIT_CODE = 1  # not the user's mistake (2), not a pre-emption (75): launchers restart it

# gloo raises plain RuntimeErrors that begin with its source file; NCCL and the store have types of their own.
_GLOO = "gloo/transport/"


def describe_loss(error: RuntimeError) -> str | None:
    """One line for an error that means: another process or the way to it is gone.

    Args:
        error: what ended the training.

    Returns:
        The line; ``None`` for any other error.
    """
    first = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, dist.DistError) and _GLOO not in first:
        return None
    world = resolve_world(os.environ)
    return (
        f"rank {world.rank} of {world.size} on {socket.gethostname()} lost another rank "
        f"({first.rpartition('] ')[2] or first}); expected every rank to answer within "
        f"{collective_timeout().total_seconds():.0f} s ({TIMEOUT_VARIABLE}); look at the logs of the others and at "
        "the network; a restart by the launcher goes on from the last checkpoint, and so does --ckpt_path last"
    )
