"""The launcher's connections end when the other side has said nothing for too long."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from qm_lightning.runtime.launcher import break_silent_connections, watch_connections

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client, accepted:
            yield client


def limit_ms(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_every_tcp_connection_gets_the_limit_and_stays_open(connection: socket.socket) -> None:
    assert limit_ms(connection) == 0
    read, write = os.pipe()  # neither this ...
    left, right = socket.socketpair()  # ... nor this is TCP
    assert break_silent_connections(20.0) >= 3  # server, client and what was accepted
    assert limit_ms(connection) == 20_000
    connection.sendall(b"still open")
    os.write(write, b"x")
    assert os.read(read, 1) == b"x"
    for number in (read, write):
        os.close(number)
    left.close()
    right.close()


def test_connections_that_are_made_later_are_found(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qm_lightning.runtime.launcher.CHECK_EVERY_S", 0.01)
    enough = watch_connections(7.0)
    deadline = time.monotonic() + 30
    while limit_ms(connection) != 7000 and time.monotonic() < deadline:
        time.sleep(0.01)
    enough.set()
    assert limit_ms(connection) == 7000


def test_it_is_torchrun_with_its_own_options_and_exit_codes() -> None:
    command = [sys.executable, "-m", "qm_lightning.runtime.launcher"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert "--rdzv-endpoint" in helped.stdout.replace("_", "-")
    bad = subprocess.run(
        [*command, "x.py"], env=os.environ | {"QM_LIGHTNING_TIMEOUT_S": "soon"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: found QM_LIGHTNING_TIMEOUT_S='soon'")
