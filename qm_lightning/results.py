"""What a finished run leaves for reports: results.json and the predictions."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer

from qm_lightning import __version__
from qm_lightning.costs import measure_cost
from qm_lightning.modules.multimodal import MultimodalModule
from qm_lightning.modules.quickmerge import QuickMergeModule


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    import lightning
    import transformers

    return {
        "qm_lightning": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path, content: Any) -> None:
    """Write under a temporary name, then rename."""
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(content, indent=2) + "\n")
    staging.replace(path)


def _class_name(spec: Any) -> str:
    return str(spec["class_path"]).rsplit(".", 1)[-1] if isinstance(spec, dict) else str(spec)


def write_results(
    run_dir: Path,
    config: dict[str, Any],
    trainer: Trainer,
    module: QuickMergeModule,
    datamodule: Any,
    steps: int,
) -> None:
    """Write results.json from the metrics of ``trainer.test`` and a cost measurement on its first batch.

    A run of several modalities gets one for each, in a folder of its name: to a report they are experiments.

    Args:
        run_dir: the run's directory.
        config: the resolved configuration of the verb.
        trainer: the trainer after ``test``.
        module: the tested module.
        datamodule: its data.
        steps: optimizer steps that the run was trained for.
    """
    metrics = {
        k.removeprefix("test/"): float(v)
        for k, v in trainer.callback_metrics.items()
        if k.startswith("test/")
    }
    if not trainer.is_global_zero:
        return
    arguments = config["model"]["init_args"]
    if not isinstance(module, MultimodalModule):
        facts = {"experiment": config["name"], "modality": datamodule.modality}
        facts |= _facts(arguments["merger"], config["seed_everything"], steps, metrics)
        _write(run_dir, facts, module, module.device, trainer.test_dataloaders, trainer.num_test_batches[0])
        return
    loaders = zip(datamodule.parts, trainer.test_dataloaders or [], trainer.num_test_batches, strict=True)
    for name, loader, batches in loaders:
        own = {k.removeprefix(f"{name}/"): v for k, v in metrics.items() if k.startswith(f"{name}/")}
        facts = {"experiment": f"{config['name']}-{name}", "modality": datamodule.parts[name].modality}
        facts |= _facts(arguments["paths"][name]["merger"], config["seed_everything"], steps, own)
        _write(run_dir / name, facts, module.view(name), module.device, loader, batches)


def _facts(merger: Any, seed: int, steps: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What results.json says of a merger and its run."""
    arguments = dict(merger.get("init_args") or {}) if isinstance(merger, dict) else {}
    budget = arguments.get("budget")
    return {
        "merger": _class_name(merger),
        "merger_args": arguments,
        "budget": None if budget is None else _class_name(budget),
        "compression_target": (budget or {}).get("init_args", {}).get("compression"),
        "seed": seed,
        "steps": steps,
        "split": "test",
        "metrics": metrics,
    }


def _write(
    folder: Path, facts: dict[str, Any], module: Any, device: torch.device, loader: Any, batches: int | float
) -> None:
    """Add how many samples were tested and what the first batch costs, and write."""
    batch = move_data_to_device(next(iter(loader)), device)
    cost = measure_cost(module, batch)
    folder.mkdir(parents=True, exist_ok=True)
    counted = getattr(loader, "samples_in", None)  # of the project's own loaders
    samples = None if counted is None else counted(int(batches))
    write_json(folder / "results.json", {**facts, "samples": samples, "cost": cost, "versions": versions()})


def write_predictions(run_dir: Path, batches: list[Any], trainer: Trainer, datamodule: Any) -> None:
    """Write predictions.jsonl: one line a sample, in the order of the shards, with the target beside the prediction.

    Args:
        run_dir: the run's directory.
        batches: what ``predict_step`` returned, on this rank.
        trainer: the trainer after ``predict``.
        datamodule: decodes target sequences.
    """
    if batches and isinstance(batches[0], list):  # one list per part of a mixture
        batches = [batch for part in batches for batch in part]
    rows = [row for batch in batches for row in _predicted(batch, datamodule)]
    gathered = [rows]
    if trainer.world_size > 1:
        gathered = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, rows)
    if trainer.is_global_zero:
        ordered = sorted(
            (row for part in gathered for row in part),
            key=lambda row: (row.get("modality", ""), row["position"]),
        )
        staging = run_dir / "predictions.jsonl.tmp"
        staging.write_text("".join(json.dumps(row) + "\n" for row in ordered))
        staging.replace(run_dir / "predictions.jsonl")
        print(f"{len(ordered)} predictions: {run_dir / 'predictions.jsonl'}")


def _predicted(batch: dict[str, Any], datamodule: Any) -> list[dict[str, Any]]:
    """Lines of one batch, its padding left out; what was to be said stands beside it, where data has targets."""
    names = {"sequences": "prediction", "targets": "target"}
    part = {"modality": batch["modality"]} if "modality" in batch else {}
    rows = []
    for i, position in enumerate(batch["position"].tolist()):
        if position >= 0:
            said = {
                shown: datamodule.decode_targets(batch[name][i])
                for name, shown in names.items()
                if name in batch
            }
            rows.append({"position": position, "key": batch["keys"][i], **said, **part})
    return rows
