"""torchrun that notices a pulled cable: ``python -m qm_lightning.runtime.launcher``, with torchrun's own options."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
from pathlib import Path

from torch.distributed.run import main

from qm_lightning.errors import UserError
from qm_lightning.runtime.collective_timeout import collective_timeout

OPEN_FILES = Path("/proc/self/fd")
CHECK_EVERY_S = 2.0


def break_silent_connections(timeout_s: float) -> int:
    """Let every TCP connection of this process break once the other side has acknowledged nothing for so long.

    A launcher asks its head for news each second, and after a question that timed out it waits for an answer without a
    limit (``CANCEL_WAIT`` of torch's TCPStore). Where the cable is pulled, the kernel sends again for about 15 minutes
    before it gives up (``net.ipv4.tcp_retries2``); until then the node looks alive.

    Returns:
        Connections that now have this limit; 0 where the system has no such option (``TCP_USER_TIMEOUT`` is Linux').
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT") or not OPEN_FILES.is_dir():
        return 0
    limited = 0
    for entry in OPEN_FILES.iterdir():
        try:
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
                limited += 1
        except OSError:  # not TCP, or closed meanwhile
            continue
    return limited


def watch_connections(timeout_s: float) -> threading.Event:
    """Do so from now on, also for the connections of later rendezvous, in a thread that ends with the process.

    Returns:
        The event that ends it earlier.
    """
    enough = threading.Event()

    def watch() -> None:
        while not enough.wait(CHECK_EVERY_S):
            break_silent_connections(timeout_s)

    threading.Thread(target=watch, name="break-silent-connections", daemon=True).start()
    return enough


if __name__ == "__main__":
    try:
        watch_connections(collective_timeout().total_seconds())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
