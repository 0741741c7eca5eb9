"""Nodes of one job, all on this machine: each a torchrun launcher with the project's own command behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[3]
HANGS_AFTER_S = 600.0  # starting takes ten seconds; on a machine that is busy with other work, minutes
TORCHRUN = Path(sys.executable).with_name("torchrun")


@dataclass
class Node:
    """A launcher that runs, and what it has printed."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """Everything that the launcher and its workers have printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(HANGS_AFTER_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the node hangs:\n{self.text}") from None

    def kill(self) -> None:
        """The whole machine is gone: launcher and workers, without a word."""
        for pid in reversed([self.process.pid, *descendants(self.process.pid)]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def descendants(pid: int) -> Iterator[int]:
    """Children and theirs: torchrun's workers have sessions of their own."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return
    for child in children:
        yield child
        yield from descendants(child)


@dataclass
class Job:
    """Starts nodes and ends them with the test, whatever happens in it."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def start(self, command: Sequence[str], **env: str) -> Node:
        """Start a launcher."""
        log = self.folder / f"node{len(self.nodes)}.txt"
        out: IO[bytes] = log.open("wb")
        usual = {"OMP_NUM_THREADS": "1", "QM_LIGHTNING_TIMEOUT_S": "300", "PYTHON": sys.executable}
        with out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | usual | env, stdout=out, stderr=subprocess.STDOUT
            )
        self.nodes.append(Node(process, log))
        return self.nodes[-1]

    def await_that(self, happened: Callable[[], bool]) -> None:
        """Wait for something, unless every node has ended."""
        deadline = time.monotonic() + HANGS_AFTER_S
        while not happened():
            texts = "\n".join(node.text for node in self.nodes)
            assert any(node.process.poll() is None for node in self.nodes), texts
            assert time.monotonic() < deadline, texts
            time.sleep(0.05)

    def end(self) -> None:
        """Leave nothing behind."""
        for node in self.nodes:
            node.kill()


def static(rank: int, port: int, words: Sequence[str]) -> list[str]:
    """torchrun as of old: every node is told its number."""
    return [
        str(TORCHRUN), "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--master-addr=127.0.0.1",
        f"--master-port={port}", "--", str(ROOT / "train.py"), *words,
    ]  # fmt: skip


def shipped(words: Sequence[str]) -> list[str]:
    """The launch file of the project, which meets by c10d."""
    return [str(ROOT / "configs/launch/torchrun.sh"), *words]


def newest_step(run_dir: Path) -> int:
    """Of the checkpoints that a run has kept."""
    return max((int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step_*.ckpt")), default=0)
