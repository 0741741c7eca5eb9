"""Where the figures of a training go: metrics.csv always, W&B beside it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger

from qm_lightning.runtime.csv_log import RunCSVLogger
from qm_lightning.runtime.rendezvous import on_rank_zero
from qm_lightning.runtime.run_directory import RunDirectory
from qm_lightning.runtime.wandb_run import RunLogger, TrackingOptions, announce_mode, wandb_mode

__all__ = ["TrackingOptions", "make_loggers", "wandb_mode"]


def make_loggers(
    run: RunDirectory, name: str, options: TrackingOptions, config: dict[str, Any]
) -> list[Logger]:
    """Make the loggers of a training; to be called on every rank.

    Args:
        run: the opened run directory.
        name: the experiment, the run's name in the dashboard.
        options: what to track.
        config: the whole resolved configuration, plain values.

    Returns:
        metrics.csv, and W&B unless it is off; the W&B run is open on rank 0, the same id on all.
    """
    loggers: list[Logger] = [RunCSVLogger(run.path, run.step if run.ckpt_path else None)]
    mode = on_rank_zero(lambda: announce_mode(run.path, run.run_id, options)) if options.wandb else "disabled"
    if mode != "disabled":
        logger = RunLogger.for_run(run.path, run.run_id, name, options, mode)
        logger.start(config, run.path / "config.yaml")
        loggers.append(logger)
    return loggers
