"""A signal to every process of a job leaves the data workers to the training."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ddp_runs import SAMPLES, IdModule, write_numbers

from datamodules.shards.geometry import Geometry
from datamodules.shards.loader import StreamLoader
from datamodules.shards.order import OrderSettings
from datamodules.shards.source import Source
from datamodules.shards.stream import StreamSpec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("signals")
    write_numbers(base / "train")
    return base


def loader(root: Path, start_method: str) -> StreamLoader:
    source, module = Source.open(str(root / "train")), IdModule(root, 4)
    assert source is not None
    geometry = Geometry(source.total, 4, 0, 1, "pad")
    spec = StreamSpec(source.shards, source.locate, OrderSettings(), geometry, module.decode, module.collate)
    return StreamLoader(spec, source.fingerprint, num_workers=2, start_method=start_method)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_go_on_after_a_signal_to_all(start_method: str, root: Path) -> None:
    batches = iter(loader(root, start_method))
    seen = []

    def signal_all() -> None:
        for worker in mp.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(worker.pid or 0, number)

    # Once while workers start, once when they are at work.
    for number, batch in enumerate(batches):
        seen += batch["id"][batch["valid"]].tolist()
        if number in (0, 3):
            signal_all()
    assert sorted(seen) == list(range(SAMPLES))


def test_signals_at_the_start_wait_for_the_process_itself(root: Path) -> None:
    """They are held back while workers start, and nothing of that stays."""
    iter(loader(root, "fork")).__next__()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_process_that_fails_does_not_wait_for_its_workers(root: Path, tmp_path: Path) -> None:
    """At its end multiprocessing asks them by SIGTERM, and waits."""
    script = tmp_path / "fails.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_worker_signals import loader\n"
        f"batches = iter(loader(Path({str(root)!r}), 'fork'))\n"
        "print(next(batches)['id'].tolist(), flush=True)\n"
        "raise RuntimeError('as any fault')\n"
    )
    # Its imports take a few seconds; workers that stayed would hold it for ever.
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "as any fault" in done.stderr
