"""The evaluation of a run in the run's own W&B page: a table, the figures of its summary, the merge pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qm_lightning.runtime.run_directory import RunDirectory
from qm_lightning.runtime.wandb_run import RunLogger, TrackingOptions, announce_mode

_FACTS = ("experiment", "modality", "merger", "compression_target", "seed", "steps", "samples")
_PICTURES = 8  # of each modality


def publish_results(run: RunDirectory, name: str, options: TrackingOptions) -> None:
    """Log what ``test`` has written, in the same run as the training; to be called on rank 0.

    Args:
        run: the tested run, with its results.json (one for each modality in a run of several).
        name: the experiment.
        options: what to track; nothing happens without W&B.
    """
    files = sorted([*run.path.glob("results.json"), *run.path.glob("*/results.json")])
    if not options.wandb or not files:
        return
    mode = announce_mode(run.path, run.run_id, options)
    if mode == "disabled":
        return
    import wandb

    results = [json.loads(file.read_text()) for file in files]
    columns, rows = evaluation_table(results)
    logged: dict[str, Any] = {"test/results": wandb.Table(columns=columns, data=rows)}
    for file, result in zip(files, results, strict=True):
        pictures = sorted((file.parent / "report" / "examples").glob("test-*.png"))[:_PICTURES]
        if pictures:
            images = [wandb.Image(str(path), caption=path.stem) for path in pictures]
            logged[f"test/{_part(file, run.path)}merge"] = images
        logged |= {f"test/{_part(file, run.path)}{key}": value for key, value in result["metrics"].items()}
    logger = RunLogger.for_run(run.path, run.run_id, name, options, mode)
    logger.open()
    logger.experiment.log({"trainer/global_step": run.step, **logged})
    logger.close()


def evaluation_table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of tested runs: what was tested, its metrics, its cost; ``None`` where one has no such figure.

    Args:
        results: contents of results.json files.
    """
    metrics = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    costs = list(dict.fromkeys(name for result in results for name in result["cost"]))
    rows = [
        [
            *(result.get(fact) for fact in _FACTS),
            *(result["metrics"].get(name) for name in metrics),
            *(result["cost"].get(name) for name in costs),
        ]
        for result in results
    ]
    return [*_FACTS, *metrics, *costs], rows


def _part(file: Path, run_dir: Path) -> str:
    return "" if file.parent == run_dir else f"{file.parent.name}/"
