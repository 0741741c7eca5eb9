"""Opens a finished or running training again: its module with the checkpoint's weights, and its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from qm_lightning.errors import UserError
from qm_lightning.modules import QuickMergeModule
from qm_lightning.runtime.allowed_imports import limit_imports
from qm_lightning.runtime.checkpoint_io import read_checkpoint
from qm_lightning.runtime.find_checkpoint import resolve_checkpoint


@dataclass(frozen=True)
class TrainedRun:
    """A run that can be used.

    Attributes:
        path: the run's directory.
        module: with the checkpoint's weights, in evaluation mode.
        data: its DataModule; the shards themselves need not be there.
        config: the resolved configuration of the training.
        checkpoint: the file that was read.
        step: optimizer steps behind it.
    """

    path: Path
    module: QuickMergeModule
    data: Any
    config: dict[str, Any]
    checkpoint: Path
    step: int


def open_trained_run(
    path: Path, checkpoint: str | None = None, backbone: str | None = None, device: str = "cpu"
) -> TrainedRun:
    """Build a run's module and data from its config.yaml, and load a checkpoint.

    Args:
        path: the run's directory.
        checkpoint: ``best``, ``last`` or a file; ``None``: ``best`` if there is one, else ``last``.
        backbone: folder or name of the backbone, if it has moved; it must be the same by its fingerprint.
        device: where the module goes.

    Returns:
        The run.

    Raises:
        UserError: no run, no configuration, no checkpoint that loads, another backbone, or no such device.
    """
    config = _read_config(path)
    if backbone is not None:
        if "paths" in config["model"]["init_args"]:
            raise UserError(
                f"--backbone {backbone} was given and {path} has a backbone for each modality; expected a run with "
                "one; put them back to where its config.yaml names them"
            )
        stored = config["model"]["init_args"]["backbone"]["init_args"]
        data = config["data"]["init_args"]
        if data.get("tokenizer") == stored["name_or_path"]:  # it moved with the backbone
            data["tokenizer"] = backbone
        stored["name_or_path"] = backbone
    if checkpoint is None:
        checkpoint = "best" if (path / "checkpoints" / "best.ckpt").is_file() else "last"
    found = resolve_checkpoint(path, checkpoint)
    module, data = _build(config)
    content = read_checkpoint(found.path)
    module.on_load_checkpoint(content)
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{found.path} does not fit {path / 'config.yaml'} ({reason[:300]}); expected the checkpoint of "
            "this run; name another one with --ckpt_path"
        ) from error
    module.eval().requires_grad_(False)
    return TrainedRun(path, _moved(module, device), data, config, found.path, found.step)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{path} holds no config.yaml; expected the directory of a training (runs/NAME/VERSION); check the path"
        )
    config = yaml.safe_load(file.read_text())
    parts = config.get("model") if isinstance(config, dict) else None
    if not isinstance(parts, dict) or not {"merger", "paths"} & set(parts.get("init_args", {})):
        raise UserError(
            f"{file} trains no merger and no prior; expected a run of QuickMergeModule, StreamingModule or "
            "MultimodalModule; choose another run"
        )
    return dict(config)


def _build(config: dict[str, Any]) -> tuple[QuickMergeModule, Any]:
    """Module and data of a configuration; as on the command line, the data names the vocabulary."""
    limit_imports()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_subclass_arguments(LightningModule, "model")
    parser.link_arguments(
        "data", "model.init_args.vocab_size", compute_fn=lambda data: data.vocab_size, apply_on="instantiate"
    )
    parser.link_arguments(
        "data", "model.init_args.eos_id", compute_fn=lambda data: data.eos_id, apply_on="instantiate"
    )
    model = {**config["model"], "init_args": dict(config["model"]["init_args"])}
    for linked in ("vocab_size", "eos_id"):
        model["init_args"].pop(linked, None)
    try:
        parsed = parser.parse_object({"data": config["data"], "model": model})
    except jsonargparse.ArgumentError as error:
        raise UserError(f"the run's config.yaml does not fit this version: {error}") from error
    made = parser.instantiate(parsed)
    return made.model, made.data


def _moved(module: QuickMergeModule, device: str) -> QuickMergeModule:
    try:
        return module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used ({reason}); expected cpu, cuda or cuda:N"
        ) from error
