"""Merger and prior as safetensors + config.json: what a trained module is without its training.

Reading an export needs neither Lightning nor the run that it came from, and runs no code of the file's.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import qm_lightning.merging as merging
import qm_lightning.priors as priors
from qm_lightning import __version__
from qm_lightning.described import Described, describe, make
from qm_lightning.errors import UserError
from qm_lightning.model_card import model_card
from qm_lightning.priors import PriorOutput, StreamingPrior
from qm_lightning.tokens import MergedTokens, Tokens

if TYPE_CHECKING:
    from qm_lightning.backbones import HFBackbone

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class ExportedModel(nn.Module):
    """A merger and a prior, ready for use.

    Args:
        merger: of the export.
        prior: of the export.
        config: content of config.json.

    Attributes:
        config: names the backbone, the vocabulary, the end token, and what the run reached.
    """

    def __init__(self, merger: nn.Module, prior: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.merger, self.prior, self.config = merger, prior, config

    def forward(self, tokens: Tokens, targets: Tensor) -> PriorOutput:
        """Logits of the targets; arguments as in ``ARPrior``, or the text itself in streaming mode."""
        output: PriorOutput = self.prior(self.merge(tokens), targets)
        return output

    def merge(self, tokens: Tokens) -> MergedTokens:
        """What the prior reads."""
        merged: MergedTokens = self.merger(tokens)
        return merged

    def load_backbone(self, name_or_path: str | None = None, download: bool = False) -> HFBackbone:
        """The backbone that the model was trained behind, on the model's device.

        Args:
            name_or_path: where it lies now; ``None``: where it lay in training.
            download: fetch it by its name, over the network.

        Raises:
            UserError: it cannot be loaded, or has other weights.
        """
        from qm_lightning.backbones import HFBackbone

        stored = self.config["backbone"]
        backbone = HFBackbone(
            name_or_path or stored["name_or_path"],
            layers=list(stored["layers"]),
            received=stored["received"],
            special_tokens=stored["special_tokens"],
            dtype=stored["dtype"],
            download=download,
        )
        self.check_backbone(backbone)
        return backbone.to(next(self.prior.parameters()).device)

    def check_backbone(self, backbone: HFBackbone) -> None:
        """Refuse another backbone than that of the training.

        Raises:
            UserError: the fingerprints differ.
        """
        stored = self.config["backbone"]
        if backbone.fingerprint() != stored["fingerprint"]:
            raise UserError(
                f"the export was trained behind {stored['name_or_path']!r} and the backbone "
                f"{backbone.name_or_path!r} has other weights; expected fingerprint "
                f"{stored['fingerprint'][:12]}..., found {backbone.fingerprint()[:12]}...; pass that backbone"
            )


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
        module: a ``QuickMergeModule`` or ``StreamingModule``, or what has ``backbone``, ``merger``, ``prior``
            and ``eos_id`` like one.
        directory: new or empty; ``model.safetensors``, ``config.json`` and ``README.md`` go there.
        facts: of the run, for config.json and the model card: ``experiment``, ``step``, ``metrics``, ...
        text: how prompts are read and targets are written, of a text model: ``tokenizer`` and ``targets`` as
            ``TextDataModule`` takes them. ``train.py generate`` needs it.
        overwrite: replace these three files if they are there.

    Returns:
        The directory.

    Raises:
        UserError: the directory is in use, or merger or prior cannot be described.
    """
    out = Path(directory)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise UserError(f"{out} is not empty; expected a new directory; choose another, or add --overwrite")
    config = _config(module, dict(facts or {}), dict(text) if text else None)
    weights = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, owner in (("merger", module.merger), ("prior", module.prior))
        for name, tensor in owner.state_dict().items()
    }
    _load(_made(config, (type(module.merger), type(module.prior)), str(out)), weights, str(out))
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    _replace(out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    _replace(out / CARD, model_card(config, sum(w.numel() for w in weights.values())).encode())
    return out


def from_pretrained(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Iterable[type] = (),
) -> ExportedModel:
    """Read an export, in evaluation mode.

    Args:
        directory: of ``save_pretrained``.
        device: where the model goes.
        dtype: of the weights; ``None``: as they were saved. Counters and thresholds of the merger keep theirs, so
            that what is merged does not change with it.
        classes: mergers of your own that the export may name.

    Returns:
        The model.

    Raises:
        UserError: a file is missing or broken, the format is newer than this version, or no such device.
    """
    path = Path(directory)
    config = _read_config(path)
    model = _made(config, classes, str(path / CONFIG))
    _load(model, _read_weights(path / WEIGHTS), str(path / WEIGHTS))
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


def _config(module: Any, facts: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
    for part in ("merger", "prior"):
        if not isinstance(getattr(module, part), Described):
            raise UserError(
                f"the {part} is a {type(getattr(module, part)).__name__}; expected one of qm_lightning's or a "
                "subclass of them, which know their own arguments"
            )
    if getattr(module.merger, "inside", False):
        raise UserError(
            f"the merger is a {type(module.merger).__name__}, which works between the layers of the backbone, "
            "and an export holds no backbone; expected a merger behind it; go on from the checkpoint instead"
        )
    backbone = module.backbone
    return {
        "format": FORMAT,
        "mode": "streaming" if isinstance(module.prior, StreamingPrior) else "conditioning",
        "backbone": {
            "name_or_path": str(backbone.name_or_path),
            "fingerprint": backbone.fingerprint(),
            "modality": backbone.modality,
            "hidden_size": backbone.hidden_size,
            "layers": list(backbone.layers),
            "received": backbone.received,
            "special_tokens": backbone.special_tokens,
            "dtype": str(next(backbone.parameters()).dtype).removeprefix("torch."),
        },
        "merger": describe(module.merger),
        "prior": describe(module.prior),
        "vocab_size": module.prior.vocab_size,
        "eos_id": module.eos_id,
        "text": text,
        "facts": facts,
        "versions": {
            "qm_lightning": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def _made(config: Mapping[str, Any], classes: Iterable[type], where: str) -> ExportedModel:
    """A model with fresh weights."""
    known = {name: getattr(room, name) for room in (merging, priors) for name in room.__all__}
    known = {n: c for n, c in known.items() if isinstance(c, type) and issubclass(c, Described)}
    known |= {c.__name__: c for c in classes}
    merger, prior = make(config["merger"], known, where), make(config["prior"], known, where)
    merger.build(config["backbone"]["hidden_size"], len(config["backbone"]["layers"]))
    return ExportedModel(merger, prior, dict(config))


def _load(model: ExportedModel, weights: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the weights do not fit the description ({reason[:300]})") from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} has no {CONFIG}; expected a directory of save_pretrained; check the path")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({error}); expected that of save_pretrained; export again"
        ) from error
    found = config.get("format") if isinstance(config, dict) else None
    if not isinstance(found, int) or "prior" not in config:
        raise UserError(
            f"{file} is no export of this project; expected that of save_pretrained; check the path"
        )
    if found > FORMAT:
        raise UserError(
            f"{file} has format {found}; expected at most {FORMAT}, all that qm_lightning {__version__} knows; "
            "use a newer version"
        )
    return dict(config)


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"no {file.name} in {file.parent}; expected a complete export; export again")
    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(file)
        return weights
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is broken ({error}); expected a complete file; export again") from error


def _replace(file: Path, content: bytes) -> None:
    """Write beside the target, then rename."""
    staging = file.with_name(f".{file.name}.tmp")
    staging.write_bytes(content)
    staging.replace(file)
