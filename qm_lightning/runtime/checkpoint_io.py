"""Checkpoints on disk: a crash leaves the old or the new one whole, and reading one runs no code."""

from __future__ import annotations

import errno
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qm_lightning.errors import UserError

# torch's zip writer turns a failed write into a RuntimeError that only names these.
_WRITE_FAILURES = ("unexpected pos", "file write failed", "PytorchStreamWriter failed")


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Refuse anything but a local path: reading an address would run whatever is found there.

    Raises:
        UserError: the path looks like ``scheme://...``.
    """
    if "://" in os.fspath(path):
        raise UserError(
            f"checkpoint {os.fspath(path)!r} is an address; expected a local file, since nothing vouches for "
            "what the net answers; download it first"
        )


def read_checkpoint(path: str | os.PathLike[str], *, lazily: bool = False) -> dict[str, Any]:
    """Load a checkpoint of tensors and plain values; code in it is never run.

    Args:
        path: a local file.
        lazily: map the tensors instead of reading them: for a look at the rest.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        UserError: an address, no file, a broken file, or one that wants to run code.
    """
    refuse_address(path)
    if not Path(path).is_file():
        raise UserError(
            f"no checkpoint at {path}; expected a file; look into the run's checkpoints/ directory"
        )
    try:
        if not lazily:
            _check_sums(path)
        # An explicit True also beats TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily or None)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"checkpoint {path} is broken ({_first_line(error)}); expected a complete file; "
            "use another one of the run, or --ckpt_path last, which passes broken ones over"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} is no training checkpoint; expected one written by this project or by Lightning"
        )
    return checkpoint


def _check_sums(path: str | os.PathLike[str]) -> None:
    """Read everything once against its checksum, which torch writes and never looks at."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refusal(path: str | os.PathLike[str], error: BaseException) -> str:
    text = str(error)
    if "GLOBAL" in text or "Unsupported class" in text:
        named = re.search(r"GLOBAL:? `?([\w.]+)", text)
        found = repr(named[1]) if named else "code"
        return (
            f"checkpoint {path} is refused: it asks to run {found} while loading; expected tensors and "
            "plain values only; use a checkpoint that this project wrote"
        )
    return f"checkpoint {path} is broken ({_first_line(error)}); expected a complete file; use another one"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames, syncs the directory.

    Lightning stages in ``$TMPDIR`` and copies across file systems: a kill meanwhile leaves an empty
    ``last.ckpt`` and no old one. Here the old checkpoint stays until the new one is whole on disk.

    Attributes:
        failure: why the newest save failed (a full disk, say); ``None`` if it did not. Training goes on then,
            since space may come back; the end of the training reports it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; on a write error keep the old file and say so."""
        if storage_options is not None:
            raise TypeError("storage_options mean nothing for local files")
        refuse_address(path)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            _write(checkpoint, staging)
            staging.replace(target)
            _sync_directory(target.parent)
            self.failure = None
        except (OSError, RuntimeError) as error:
            if not _is_write_failure(error):
                raise
            kept = "the one before it is kept" if target.exists() else "there is none before it"
            self.failure = f"could not save {target} ({_reason(error, target.parent)}); {kept}"
            print(f"warning: {self.failure}; training goes on, free some space", file=sys.stderr, flush=True)
        finally:
            staging.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load without running code, whatever the caller or the environment says."""
        return read_checkpoint(path)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_write_failure(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(text in str(error) for text in _WRITE_FAILURES)


def _reason(error: BaseException, directory: Path) -> str:
    if isinstance(error, OSError) and error.errno != errno.ENOSPC:
        return error.strerror or str(error)
    status = os.statvfs(directory)
    return f"disk full: {status.f_bavail * status.f_frsize / 2**20:.1f} MiB free in {directory}"
