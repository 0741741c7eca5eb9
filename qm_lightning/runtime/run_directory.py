"""`runs/NAME/VERSION/`: one directory per training, and never a silent start from zero."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qm_lightning.errors import UserError
from qm_lightning.runtime.checkpoint_io import load_checkpoint_file


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory and the checkpoint to start from.

    Attributes:
        path: the directory.
        ckpt_path: a checkpoint that loads, or None for a fresh start.
    """

    path: Path
    ckpt_path: str | None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def write_config(self, config: dict[str, Any], verb: str) -> None:
        """Write config.yaml (``fit``) or config_VERB.yaml, on the first rank only."""
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) or int(
            os.environ.get("LOCAL_RANK", "0")
        ):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / ("config.yaml" if verb == "fit" else f"config_{verb}.yaml")
        staging = target.with_name(target.name + ".tmp")
        staging.write_text(yaml.safe_dump(config, sort_keys=False))
        staging.replace(target)


def open_run_directory(
    run_dir: str | None, name: str, *, verb: str, ckpt_path: str | None, fresh: bool
) -> RunDirectory:
    """Find the directory and the checkpoint of a verb.

    Args:
        run_dir: exact directory; None: a new version for a fresh ``fit``, else the newest version.
        name: name of the experiment.
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        ckpt_path: ``last``, ``best`` or a path; the verbs that evaluate take best, else last, by default.
        fresh: train anew in a directory with history.

    Returns:
        The directory, with a checkpoint that loads.

    Raises:
        UserError: history without ``--ckpt_path`` or ``--fresh``, or no checkpoint to be had.
    """
    path = Path(run_dir) if run_dir else _version(name, verb=verb, resume=ckpt_path is not None)
    folder = path / "checkpoints"
    if verb == "fit" and ckpt_path is None:
        if any(folder.glob("*.ckpt")) and not fresh:
            raise UserError(
                f"{path} holds the checkpoints of an earlier training; expected --ckpt_path last to go on, "
                "or --fresh true to start anew (or another --run_dir)"
            )
        return RunDirectory(path, None)
    return RunDirectory(path, str(_resolve(folder, ckpt_path)))


def _version(name: str, *, verb: str, resume: bool) -> Path:
    root = Path("runs") / name
    versions = sorted(p for p in root.glob("*") if p.is_dir()) if root.is_dir() else []
    if verb == "fit" and not resume:
        if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
            job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
            if job in (None, "none"):
                raise UserError(
                    "several processes found no common name for the run; expected --run_dir DIR; pass it"
                )
            return root / f"job_{job}"
        # A run that Lightning forks into several local processes passes its directory on.
        return root / os.environ.setdefault("QM_RUN_VERSION", time.strftime("%Y%m%d-%H%M%S"))
    if not versions:
        raise UserError(
            f"there is no run under {root}; expected one to go on with; train first, or pass --run_dir DIR"
        )
    return versions[-1]


def _candidates(folder: Path, wanted: str | None) -> list[Path]:
    steps = sorted(folder.glob("step_*.ckpt"), reverse=True)
    if wanted == "best":
        return [folder / "best.ckpt"]
    newest = [folder / "last.ckpt", *steps]
    return newest if wanted == "last" else [folder / "best.ckpt", *newest]


def _resolve(folder: Path, wanted: str | None) -> Path:
    if wanted and "://" in wanted:
        raise UserError(
            f"--ckpt_path {wanted} is a URL; expected a local file; download it and look at it first"
        )
    if wanted not in (None, "last", "best"):
        load_checkpoint_file(Path(wanted))
        return Path(wanted)
    for path in _candidates(folder, wanted):
        if not path.is_file():
            continue
        try:
            load_checkpoint_file(path)
        except UserError as error:
            print(f"passed over: {error}")
            continue
        return path
    raise UserError(
        f"there is no checkpoint{f' {wanted!r}' if wanted else ''} in {folder}; expected one; train first, "
        "or name one with --ckpt_path"
    )
