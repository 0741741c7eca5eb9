"""W&B without an account, a prompt or a hang, and metrics.csv beside it (spec runtime.md, section 4)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


@dataclass
class TrackingOptions:
    """Where metrics go.

    Attributes:
        wandb: log to W&B (metrics.csv is always written).
        project: W&B project.
        mode: ``online``, ``offline`` or ``disabled``; None: online with a key, else offline.
    """

    wandb: bool = True
    project: str = "qm-lightning"
    mode: str | None = None


def wandb_mode(requested: str | None = None) -> tuple[str, str]:
    """Decide without a prompt; at most about ten seconds of waiting.

    Returns:
        Mode, and why.
    """
    mode = requested or os.environ.get("WANDB_MODE")
    if mode:
        return ("offline" if mode == "dryrun" else mode), "as requested"
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except Exception as error:  # noqa: BLE001, RUF100  # whatever the service answers, the training goes on
        return "offline", f"W&B cannot be reached or refused the key ({type(error).__name__})"
    return (
        ("online", "logged in")
        if logged_in
        else ("offline", "no W&B key (set WANDB_API_KEY, or run wandb login)")
    )


def _run_id(run_dir: Path) -> str:
    """The run's id, made before training and kept, so that a resumed training is the same W&B run."""
    import uuid

    path = run_dir / "wandb_id"
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        staging = path.with_name("wandb_id.tmp")
        staging.write_text(uuid.uuid4().hex[:12])
        staging.replace(path)
    return path.read_text().strip()


class MetricsCsv(CSVLogger):
    """Lightning's CSVLogger with its file in the run directory itself."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(save_dir=str(run_dir), name="", version="")

    @property
    def log_dir(self) -> str:
        """The run directory."""
        return str(self._save_dir)


def make_loggers(
    run_dir: Path, name: str, options: TrackingOptions, config: dict[str, Any], rank: int
) -> list[Logger]:
    """Make the loggers of a training.

    Args:
        run_dir: the run's directory.
        name: shown in W&B.
        options: where metrics go.
        config: the whole resolved configuration, kept in W&B under ``config``.
        rank: only rank 0 creates a run.

    Returns:
        metrics.csv, and W&B unless it is off.
    """
    loggers: list[Logger] = [MetricsCsv(run_dir)]
    if options.wandb and rank == 0:
        mode, reason = wandb_mode(options.mode)
        if mode != "disabled":
            where = f"; upload with: wandb sync {run_dir}/wandb/offline-run-*" if mode == "offline" else ""
            print(f"W&B {mode}: {reason}{where}")
            run_dir.mkdir(parents=True, exist_ok=True)
            logger = WandbLogger(
                name=name, project=options.project, save_dir=str(run_dir), id=_run_id(run_dir), mode=mode,
                resume="allow", config={"config": config},
            )  # fmt: skip
            loggers.append(logger)
    return loggers
