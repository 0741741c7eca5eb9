"""Checkpoints on disk: whole or the old one, and reading one runs no code."""

import contextlib
import multiprocessing as mp
import os
import pickle
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO, read_checkpoint


def content(step: int, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((size,), float(step))}, "global_step": step}


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(content(3), tmp_path / "new" / "last.ckpt")
    assert torch.equal(
        io.load_checkpoint(tmp_path / "new/last.ckpt")["state_dict"]["w"], torch.full((1000,), 3.0)
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("format_", ["torch", "pickle"])
@pytest.mark.parametrize("env", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_a_checkpoint_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, env: dict[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    proof, path = tmp_path / "proof", tmp_path / "evil.ckpt"
    evil = {**content(1), "hyper_parameters": Evil(proof)}
    if format_ == "torch":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Evil(proof)}, protocol=2))
    with pytest.raises(UserError, match=r"refused: it asks to run 'posix\.system'"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not proof.exists()
    # The trap is real: the file does run its code where nobody refuses it.
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize(
    "address", ["https://example.org/last.ckpt", "s3://bucket/last.ckpt", "file:///x.ckpt"]
)
def test_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="is an address"):
        read_checkpoint(address)
    with pytest.raises(UserError, match="is an address"):
        AtomicCheckpointIO().save_checkpoint(content(1), address)


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, 4000])
def test_a_cut_file_is_called_broken(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(content(1), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is broken"):
        read_checkpoint(path)


def test_flipped_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(content(7, 4000), path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is broken"):
        read_checkpoint(path)


def test_other_files_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="no training checkpoint"):
        read_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "absent.ckpt")


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The kernel refuses to write a file beyond this many bytes (as it refuses on a full disk)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield 200_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_a_refused_write_keeps_the_old_file(
    tmp_path: Path, file_size_limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(content(1), path)
    io.save_checkpoint(content(2, file_size_limit), path)
    assert "could not save" in capsys.readouterr().err
    assert io.failure is not None
    assert "the one before it is kept" in io.failure
    assert read_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    io.save_checkpoint(content(3), path)  # room again
    assert io.failure is None
    assert read_checkpoint(path)["global_step"] == 3


def test_a_full_disk_is_named(small_disk: Path) -> None:
    io, path = AtomicCheckpointIO(), small_disk / "last.ckpt"
    io.save_checkpoint(content(1), path)
    io.save_checkpoint(content(2, 400_000), path)
    assert io.failure is not None
    assert "disk full" in io.failure
    assert read_checkpoint(path)["global_step"] == 1


def _save_for_ever(path: Path) -> None:
    torch.set_num_threads(
        1
    )  # a forked process cannot use its parent's OpenMP threads: it would wait for ever
    io, step = AtomicCheckpointIO(), 0
    while True:
        step += 1
        io.save_checkpoint(content(step, 500_000), path)


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$TMPDIR on another file system, where Lightning's own save copies and can be cut in the middle."""
    monkeypatch.setenv("TMPDIR", "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
    path, newest = tmp_path / "last.ckpt", 0
    for attempt in range(6):
        process = mp.get_context("fork").Process(target=_save_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03 + 0.017 * attempt)
        process.kill()
        process.join()
        loaded = read_checkpoint(path)
        newest = loaded["global_step"]
        assert torch.equal(loaded["state_dict"]["w"], torch.full((500_000,), float(newest)))
    assert newest >= 1
