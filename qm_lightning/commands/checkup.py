"""What can be wrong on one machine, found before a training and not after an hour of it."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from datamodules.errors import DataError
from datamodules.shards.manifest import Manifest
from qm_lightning.errors import UserError

Verdict = Literal["good", "warn", "bad"]

_LEAST_FREE = 2**30  # bytes
_NEEDED = ("torch", "lightning", "torchmetrics", "transformers", "jsonargparse", "wandb", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        topic: what was looked at.
        verdict: ``bad`` makes the doctor fail.
        text: what was found, and how to mend it.
    """

    topic: str
    verdict: Verdict
    text: str


def check_versions() -> list[Finding]:
    """Installed packages against what this project asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = {
            r.name: r for r in map(Requirement, metadata.requires("qm-lightning") or []) if r.marker is None
        }
    except metadata.PackageNotFoundError:
        return [Finding("versions", "bad", "qm-lightning is not installed; run pip install -e . here")]
    found, findings = [], []
    for name, requirement in wanted.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding("versions", "bad", f"{name} is missing; run pip install '{requirement}'"))
            continue
        found.append(f"{name} {version}")
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            text = f"{name} {version}; expected {requirement.specifier}; run pip install '{requirement}'"
            findings.append(Finding("versions", "bad", text))
    return findings or [Finding("versions", "good", ", ".join(found))]


def check_imports() -> list[Finding]:
    """Import what training imports; a package of another build than torch shows here."""
    bad = []
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001, RUF100  # whatever an import raises is the finding
            bad.append(Finding("imports", "bad", f"import {name}: {_first_line(error)}{_cure(error)}"))
    return bad or [Finding("imports", "good", ", ".join(_NEEDED))]


def _cure(error: Exception) -> str:
    if "torchvision" in str(error):
        return "; torchvision is of another build than torch: uninstall it, or install both from one index"
    return ""


def check_devices() -> list[Finding]:
    """A GPU that torch cannot use."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [Finding("device", "good", ", ".join(names))]
    if Path("/proc/driver/nvidia/gpus").is_dir():
        text = (
            f"this machine has a GPU and torch {torch.__version__} cannot use it; install the CUDA build of "
            "torch, or hide the GPU with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
        return [Finding("device", "bad", text)]
    return [Finding("device", "good", f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]


def check_shards(root: Path) -> list[Finding]:
    """Shards against their manifest: there, and as long as it says."""
    folders = [root / split for split in ("train", "val", "test") if (root / split).is_dir()]
    if not folders:
        return [Finding("shards", "bad", f"{root} has no train/, val/ or test/; check --data")]
    return [_check_split(folder) for folder in folders]


def _check_split(folder: Path) -> Finding:
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return Finding("shards", "bad", str(error))
    for entry in manifest.shards:
        path = folder / entry.name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            text = (
                f"{path} {found}, the index says {entry.bytes}; python -m datamodules verify {folder.parent}"
            )
            return Finding("shards", "bad", text)
    text = f"{folder}: {len(manifest.shards)} shards, {manifest.total} samples, {manifest.fingerprint}"
    return Finding("shards", "good", text)


def check_backbone(name_or_path: str) -> list[Finding]:
    """Load the frozen backbone as a training would."""
    from qm_lightning.backbones import HFBackbone

    try:
        backbone = HFBackbone(name_or_path)
    except UserError as error:
        return [Finding("backbone", "bad", str(error))]
    text = f"{name_or_path}: {backbone.modality}, width {backbone.hidden_size}, {backbone.fingerprint()[:16]}"
    return [Finding("backbone", "good", text)]


def check_disk(folder: Path) -> list[Finding]:
    """Room and permission to write checkpoints, and shared memory for data workers."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    findings = []
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        findings.append(Finding("disk", "bad", f"cannot write in {place}: {error.strerror}; check --run_dir"))
    for path in (place, Path("/dev/shm")):  # noqa: S108  # looked at, not written to
        if not path.is_dir():
            continue
        free = shutil.disk_usage(path).free
        text = f"{free / 2**30:.1f} GiB free in {path}"
        enough = free >= (_LEAST_FREE if path == place else _LEAST_FREE // 16)
        mend = "" if enough else "; expected 1 GiB for checkpoints, 64 MiB in shared memory; free some"
        findings.append(Finding("disk", "good" if enough else "warn", text + mend))
    return findings


def check_tracking() -> list[Finding]:
    """Whether W&B would be online; waits a bounded time."""
    from qm_lightning.runtime.wandb_run import wandb_mode

    mode, reason = wandb_mode()
    return [Finding("W&B", "good", f"{mode}: {reason}")]


def check_restarts(env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Restarts of torchrun hang on the keys of the attempt before, unless told to use a new store."""
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in env:
        text = "--max-restarts without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: a restart would hang; export it"
        return [Finding("launcher", "warn", text)]
    return []


def guarded(check: Callable[[], list[Finding]], topic: str) -> list[Finding]:
    """Run a check; whatever it raises is its finding, so that the others still run."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001, RUF100  # a doctor does not faint
        return [Finding(topic, "bad", f"{type(error).__name__}: {_first_line(error)}")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
