"""Brings the processes together before anything is built, and lets them agree on plain Python values."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from qm_lightning.errors import UserError
from qm_lightning.runtime.collective_timeout import collective_timeout
from qm_lightning.runtime.strategy import backend_of, cluster_environment
from qm_lightning.runtime.world import World

T = TypeVar("T")

_POLL_S = 0.05
_cpu_group: dist.ProcessGroup | None = None


def join(world: World, accelerator: str = "auto", timeout: timedelta | None = None) -> None:
    """Wait for all processes and start the default process group; Lightning then uses it as it is.

    Args:
        world: the processes; does nothing for a single one, or when a process group exists.
        accelerator: ``trainer.accelerator``, decides between nccl and gloo.
        timeout: how long to wait for the others, and later in every collective; ``None``: the usual.

    Raises:
        UserError: some rank did not arrive; the message names it.
    """
    # Lightning guesses the rank when it is imported; loggers ask for it before the trainer exists.
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    if world.size == 1 or dist.is_initialized():
        return
    timeout = timeout or collective_timeout()
    environment = cluster_environment(world)
    address, port = environment.main_address, environment.main_port
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    store = _connect(world, address, port, timeout)
    _await_all(world, store, f"{address}:{port}", timeout)
    dist.init_process_group(
        backend_of(accelerator), store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    atexit.register(leave)


def local_address(world: World) -> str:
    """The address from which this process reaches rank 0, and the interface that it was told to use."""
    named = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or ""
    target = "127.0.0.1" if world.size == 1 else os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # no packet is sent: it only asks for the route
            address = str(probe.getsockname()[0])
    except OSError:
        address = f"no route to {target}"
    return f"{named} {address}".strip()


def leave() -> None:
    """Destroy the process group, if there is one."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _connect(world: World, address: str, port: int, timeout: timedelta) -> Store:
    # torchrun may keep a store of its own open at this address; without it rank 0 serves it.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            world.size,
            is_master=world.rank == 0 and not served,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"rank {world.rank} on {socket.gethostname()} could not reach rank 0 at {address}:{port} within "
            f"{timeout.total_seconds():.0f} s ({_first_line(error)}); expected it to answer; check that it runs, "
            "that the port is free and that the nodes reach each other"
        ) from error
    return PrefixStore(f"qm_lightning/{world.restarts}", store)


def _await_all(world: World, store: Store, where: str, timeout: timedelta) -> None:
    store.set(f"here/{world.rank}", socket.gethostname())
    if world.rank == 0:
        missing = _await_ranks(store, world.size, timeout)
        store.set("verdict", ",".join(map(str, missing)) or "all here")
    else:
        # Rank 0 may have come up much later than this one: it then waits its own full timeout.
        store.wait(["verdict"], timeout + timedelta(seconds=10))
    verdict = store.get("verdict").decode()
    if verdict != "all here":
        raise UserError(
            f"rank {verdict} of {world.size} did not reach {where} within {timeout.total_seconds():.0f} s; "
            "expected every rank; look at that rank's log, and check that its node reaches this address"
        )


def _await_ranks(store: Store, size: int, timeout: timedelta) -> list[int]:
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(size))
    while True:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_POLL_S)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def cpu_group() -> dist.ProcessGroup | None:
    """A process group for small host-side values, so that no decision waits for a GPU.

    Every rank must make the first call at the same point: it may create the group.

    Returns:
        The default group where it is gloo, else a gloo group beside it; ``None`` for a single process.
    """
    global _cpu_group
    if not dist.is_initialized():
        return None
    if _cpu_group is None:
        default = dist.group.WORLD
        _cpu_group = (
            default
            if dist.get_backend() == "gloo"
            else dist.new_group(backend="gloo", timeout=collective_timeout())
        )
    return _cpu_group


def gather(value: T) -> list[T]:
    """Every rank's plain value, in the order of the ranks, on every rank."""
    group = cpu_group()
    if group is None:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def on_rank_zero(call: Callable[[], T]) -> T:
    """Decide something on rank 0 for everybody.

    Args:
        call: runs on rank 0 only.

    Returns:
        Its plain value, on every rank.

    Raises:
        UserError: what ``call`` raised, on every rank, so that none is left waiting.
    """
    group = cpu_group()
    if group is None:
        return call()
    answer: list[T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [call()]
        except UserError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]
