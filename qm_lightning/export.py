"""Merger and prior as safetensors + config.json: what a trained module is without its training.

Reading an export needs neither Lightning nor the run that it came from, and runs no code of the file's.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import qm_lightning.merging as merging
import qm_lightning.priors as priors
from qm_lightning import __version__
from qm_lightning.described import Described, describe, make
from qm_lightning.errors import UserError
from qm_lightning.export_files import (
    CARD,
    CONFIG,
    ONE,
    SEVERAL,
    WEIGHTS,
    read_config,
    read_weights,
    replace_file,
)
from qm_lightning.exported_model import ExportedModel
from qm_lightning.model_card import model_card
from qm_lightning.priors import StreamingPrior

__all__ = ["ExportedModel", "from_pretrained", "is_export", "save_pretrained"]


def save_pretrained(
    module: Any,
    directory: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write merger, prior and what is to be known of them.

    Args:
        module: a ``QuickMergeModule``, ``StreamingModule`` or ``MultimodalModule``, or what has ``backbone``,
            ``merger``, ``prior`` and ``eos_id`` like one.
        directory: new or empty; ``model.safetensors``, ``config.json`` and ``README.md`` go there.
        facts: of the run, for config.json and the model card: ``experiment``, ``step``, ``metrics``, ...
        text: how prompts are read and targets are written, of a text model: ``tokenizer`` and ``targets`` as
            ``TextDataModule`` takes them; of a ``MultimodalModule``, that of each part that reads text, by name.
            ``train.py generate`` needs it.
        overwrite: replace these three files if they are there.

    Returns:
        The directory.

    Raises:
        UserError: the directory is in use, or merger or prior cannot be described.
    """
    out = Path(directory)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected the path of a new directory; choose another")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; expected a new directory; choose another, or add --overwrite")
    config = _config(module, dict(facts or {}), dict(text) if text else None)
    weights = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, owner in (("merger", module.merger), ("prior", module.prior))
        for name, tensor in owner.state_dict().items()
    }
    classes = {type(part) for part in (*_by_modality(module.merger).values(), module.prior)}
    _load(_made(config, classes, str(out)), weights, str(out))
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    replace_file(out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    replace_file(out / CARD, model_card(config, sum(w.numel() for w in weights.values())).encode())
    return out


def from_pretrained(
    directory: str | Path,
    *,
    modality: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Iterable[type] = (),
) -> ExportedModel:
    """Read an export, in evaluation mode.

    Args:
        directory: of ``save_pretrained``.
        modality: which part of a ``MultimodalModule`` is wanted; ``None``: the export has one merger only.
        device: where the model goes.
        dtype: of the weights; ``None``: as they were saved. Counters and thresholds of the merger keep theirs, so
            that what is merged does not change with it.
        classes: mergers of your own that the export may name.

    Returns:
        The model.

    Raises:
        UserError: a file is missing or broken, the format is newer than this version, there is no such modality, or
            no such device.
    """
    path = Path(directory)
    config = read_config(path)
    whole = _made(config, classes, str(path / CONFIG))
    _load(whole, read_weights(path / WEIGHTS), str(path / WEIGHTS))
    model = _chosen(whole, config, modality, path)
    model.eval().requires_grad_(False)
    if dtype is not None:
        model.prior.to(dtype)
        for parameter in model.merger.parameters():
            parameter.data = parameter.data.to(dtype)
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {device!r} cannot be used ({reason}); expected cpu, cuda or cuda:N"
        ) from error


def is_export(directory: Path) -> bool:
    """Whether a directory looks like one of ``save_pretrained``, and not like that of a training."""
    return (directory / CONFIG).is_file() and not (directory / "config.yaml").exists()


def _by_modality(part: Any) -> dict[str, Any]:
    """Mergers or backbones of a ``MultimodalModule`` by name; a single one under the name ``""``."""
    return dict(part.items()) if isinstance(part, nn.ModuleDict) else {"": part}


def _config(module: Any, facts: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
    mergers, backbones = _by_modality(module.merger), _by_modality(module.backbone)
    for part in (*mergers.values(), module.prior):
        if not isinstance(part, Described):
            raise UserError(
                f"the module has a {type(part).__name__}; expected a merger and a prior of qm_lightning's or "
                "subclasses of them, which know their own arguments"
            )
        if getattr(part, "inside", False):
            raise UserError(
                f"the merger is a {type(part).__name__}, which works between the layers of the backbone, "
                "and an export holds no backbone; expected a merger behind it; go on from the checkpoint instead"
            )
    several = isinstance(module.merger, nn.ModuleDict)
    texts = (text or {}) if several else {"": text}
    paths = {
        name: {"backbone": _backbone(backbones[name]), "merger": describe(merger), "text": texts.get(name)}
        for name, merger in mergers.items()
    }
    return {
        "format": SEVERAL if several else ONE,
        "mode": "streaming" if isinstance(module.prior, StreamingPrior) else "conditioning",
        **({"paths": paths} if several else paths[""]),
        "prior": describe(module.prior),
        "vocab_size": module.prior.vocab_size,
        "eos_id": module.eos_id,
        "facts": facts,
        "versions": {
            "qm_lightning": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def _backbone(backbone: Any) -> dict[str, Any]:
    return {
        "name_or_path": str(backbone.name_or_path),
        "fingerprint": backbone.fingerprint(),
        "modality": backbone.modality,
        "hidden_size": backbone.hidden_size,
        "layers": list(backbone.layers),
        "received": backbone.received,
        "special_tokens": backbone.special_tokens,
        "dtype": str(next(backbone.parameters()).dtype).removeprefix("torch."),
    }


def _made(config: Mapping[str, Any], classes: Iterable[type], where: str) -> nn.ModuleDict:
    """Merger (or mergers by modality) and prior with fresh weights, under the names of their weights."""
    known = {name: getattr(room, name) for room in (merging, priors) for name in room.__all__}
    known = {n: c for n, c in known.items() if isinstance(c, type) and issubclass(c, Described)}
    known |= {c.__name__: c for c in classes}

    def merger(path: Mapping[str, Any]) -> nn.Module:
        made: merging.Merger = make(path["merger"], known, where)
        made.build(path["backbone"]["hidden_size"], len(path["backbone"]["layers"]))
        return made

    paths = config.get("paths")
    mergers = merger(config) if paths is None else nn.ModuleDict({n: merger(p) for n, p in paths.items()})
    return nn.ModuleDict({"merger": mergers, "prior": make(config["prior"], known, where)})


def _chosen(whole: nn.ModuleDict, config: dict[str, Any], modality: str | None, path: Path) -> ExportedModel:
    """One merger and the prior of what ``_made`` made."""
    paths = config.get("paths")
    if paths is None:
        if modality is not None:
            raise UserError(
                f"modality={modality!r} was asked of {path}, which has one merger only; leave modality out"
            )
        return ExportedModel(whole["merger"], whole["prior"], config)
    if modality not in paths:
        raise UserError(
            f"{path} holds several modalities and modality={modality!r} was asked for; expected one of "
            f"{', '.join(paths)}; name it with modality=..."
        )
    widths = {name: part["backbone"]["hidden_size"] for name, part in paths.items()}
    before = sum(widths[name] for name in list(paths)[: list(paths).index(modality)])
    place = before, sum(widths.values()) - before - widths[modality]
    mergers: Any = whole["merger"]
    return ExportedModel(mergers[modality], whole["prior"], {**config, **paths[modality]}, place)


def _load(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the weights do not fit the description ({reason[:300]})") from error
