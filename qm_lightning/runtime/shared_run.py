"""System metrics of the nodes beside rank 0's, in rank 0's W&B run."""

from __future__ import annotations

import sys
from pathlib import Path

from qm_lightning.runtime.wandb_run import TrackingOptions, run_settings
from qm_lightning.runtime.world import World


def join_shared_run(run_dir: Path, run_id: str, options: TrackingOptions, world: World) -> None:
    """Add this node's metrics to the run that rank 0 has opened; to be called on every rank.

    One process of each further node joins. A node that W&B does not answer trains on without its metrics.

    Args:
        run_dir: W&B's files go to ``wandb/`` in it.
        run_id: the run's id.
        options: what to track.
        world: the processes.
    """
    node = world.rank // world.devices
    if node == 0 or world.local_rank != 0:
        return
    import wandb

    try:
        wandb.init(
            project=options.project,
            entity=options.entity,
            id=run_id,
            dir=str(run_dir),
            mode="shared",
            settings=run_settings(node),
        )
    except wandb.errors.Error as error:
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"W&B: no metrics of node {node} ({first})", file=sys.stderr, flush=True)
