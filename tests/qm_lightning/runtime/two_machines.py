"""Two network namespaces with addresses and host names of their own, joined by a cable that can be pulled."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path


class TwoMachines:
    """``node0`` and ``node1``; needs root.

    Raises:
        OSError: this machine does not let us make them.
    """

    def __init__(self) -> None:
        self.names = [f"qm{uuid.uuid4().hex[:8]}" for _ in range(2)]
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                hosts = Path("/etc/netns") / name / "hosts"  # what its processes see as /etc/hosts
                hosts.parent.mkdir(parents=True)
                hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
            cable = ["type", "veth", "peer", "name", "cable"]
            _ip("-n", self.names[0], "link", "add", "cable", *cable, "netns", self.names[1])
            for i, name in enumerate(self.names):
                _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove()
            raise OSError(f"no network namespaces here: {error}") from error

    def on(self, node: int, command: list[str]) -> list[str]:
        """The command as it is run on a node, which has a host name of its own."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname node{node}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.names[node], *named, *command]

    def pull_the_cable(self) -> None:
        """No packet passes any more, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def remove(self) -> None:
        """Take everything away again; processes in it must have ended."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
