"""What a comparison will run, checked before anything runs."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse

from qm_lightning import merging
from qm_lightning.backbones import HFBackbone, InBackbone
from qm_lightning.commands.train import Parser, QuickMergeCLI, share_processor
from qm_lightning.comparing.specs import MergerSpec
from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, Merger
from qm_lightning.runtime.option_errors import explain

MERGER = "model.merger"
# Neither changes what a cell computes.
WITHOUT_EFFECT = ("run_dir", "fresh", "ckpt_path", "logger", "checkpoint_every", "seed_everything")


@dataclass(frozen=True)
class Plan:
    """One merger at one compression.

    Attributes:
        spec: the merger as written.
        compression: asked for; ``None``: the merger has no budget.
        options: command-line options that set merger and compression.
        merger: the merger's resolved configuration.
        seeded: the merger takes a seed.
        built: the merger itself, for checks.
    """

    spec: MergerSpec
    compression: float | None
    options: tuple[str, ...]
    merger: dict[str, Any]
    seeded: bool
    built: Merger


class _ConfigurationOnly(QuickMergeCLI):
    """Reads and checks the configuration of ``fit``, and builds nothing."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only fit: the parsers of the other verbs take time to build."""
        return {"fit": QuickMergeCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        """Only the check that backbone and data agree."""
        share_processor(self.config["fit"])

    def instantiate_classes(self) -> None:
        """Nothing."""
        self._dump_config()

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def resolve(options: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of ``fit`` with these options.

    Raises:
        UserError: the configuration is wrong, or has no merger.
    """
    cli = _ConfigurationOnly(["fit", *options])
    config: dict[str, Any] = cli.config_dump
    if "merger" not in (config["model"].get("init_args") or {}):
        trained = config["model"]["class_path"].rsplit(".", 1)[-1]
        raise UserError(
            f"the configuration trains {trained}, which has no merger; "
            "expected an experiment such as configs/experiment/image.yaml"
        )
    return config


def known_mergers() -> list[str]:
    """Class names that ``--mergers`` takes."""
    classes = {name: getattr(merging, name) for name in merging.__all__}
    classes["InBackbone"] = InBackbone
    return sorted(
        name
        for name, item in classes.items()
        if inspect.isclass(item) and issubclass(item, Merger) and not inspect.isabstract(item)
    )


def make_plans(
    specs: Sequence[MergerSpec], compressions: Sequence[float], base: dict[str, Any]
) -> list[Plan]:
    """Build each merger at each compression once, so that what cannot be is found here.

    Args:
        specs: mergers.
        compressions: each at least 1.
        base: the resolved configuration; its merger's arguments hold for a spec of the same class.

    Returns:
        Plans in the order of ``specs``; a merger without a budget once.

    Raises:
        UserError: a merger is unknown, or does not take its arguments or a compression.
    """
    plans = []
    for spec in specs:
        known = known_mergers()
        if spec.name not in known:
            near = difflib.get_close_matches(spec.name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--mergers has {spec.name!r}; {hint}expected some of {', '.join(known)}")
        budget = _budget(spec, base)
        plans += [_plan(spec, c, budget, base) for c in (compressions if budget else [None])]
    return plans


def _merger_class(name: str) -> type[Merger]:
    kind: type[Merger] = InBackbone if name == "InBackbone" else getattr(merging, name)
    return kind


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_merger_class(name)).parameters)


def _settings(spec: MergerSpec, budget: str | None, compression: float | None) -> list[str]:
    """Options that a spec stands for."""
    options = [f"--{MERGER}", spec.name]
    if budget is not None:
        options += [f"--{MERGER}.init_args.budget", budget]
    if compression is not None:
        options += [f"--{MERGER}.init_args.budget.init_args.compression", f"{compression:g}"]
    for key, value in spec.arguments:
        if key != "budget":
            path = key.replace("budget.", "budget.init_args.", 1) if key.startswith("budget.") else key
            options += [f"--{MERGER}.init_args.{path}", value]
    return options


def _build(
    spec: MergerSpec, budget: str | None, compression: float | None, base: dict[str, Any]
) -> tuple[dict[str, Any], Merger]:
    """The merger's resolved configuration, and the merger itself.

    Only a merger of the configured class starts from the configured arguments: a rival must not inherit
    QuickMerge's budget because the two happen to share an argument's name.
    """
    parser = Parser(prog="--mergers", exit_on_error=False)
    parser.add_subclass_arguments(Merger, MERGER)
    configured = base["model"]["init_args"]["merger"]
    same = configured["class_path"].rsplit(".", 1)[-1] == spec.name
    start = [f"--{MERGER}={json.dumps(configured)}"] if same else []
    try:
        config = parser.parse_args([*start, *_settings(spec, budget, compression)])
        merger: Merger = parser.instantiate(config)[MERGER]
    except (UserError, TypeError, ValueError, jsonargparse.ArgumentError) as error:
        raise UserError(f"--mergers has {spec.label!r}: {explain(str(error))}") from error
    return config.as_dict()["model"]["merger"], merger


def _budget(spec: MergerSpec, base: dict[str, Any]) -> str | None:
    """Class name of the merger's budget: as written, as configured, or its default; ``None``: it has none."""
    if "budget" not in _parameters(spec.name):
        return None
    _, merger = _build(spec, spec.get("budget"), None, base)
    # A merger may read its budget and not keep it.
    budget = getattr(merger, "budget", None) or FixedBudget()
    name = spec.get("budget") or type(budget).__name__
    if "compression" not in inspect.signature(type(budget)).parameters:
        raise UserError(
            f"--mergers has {spec.label!r}, whose {name} takes no compression; "
            "expected a budget that does, such as budget=FixedBudget"
        )
    return name


def _plan(spec: MergerSpec, compression: float | None, budget: str | None, base: dict[str, Any]) -> Plan:
    merger, built = _build(spec, budget, compression, base)
    # Every argument is written out, so nothing of the configured merger remains.
    text = json.dumps(merger)
    options, merger = (f"--{MERGER}", text), json.loads(text)
    return Plan(spec, compression, options, merger, "seed" in _parameters(spec.name), built)


def check_backbone(plans: Sequence[Plan], base: dict[str, Any]) -> None:
    """Show the backbone to every merger, as a training does at its start.

    Args:
        plans: of all cells.
        base: the resolved configuration.

    Raises:
        UserError: the backbone is missing, or does not give what a merger reads, or the merger cannot reach
            its compression on it.
    """
    parser = Parser(prog="--model.backbone", exit_on_error=False)
    parser.add_subclass_arguments(HFBackbone, "backbone")
    config = parser.parse_object({"backbone": base["model"]["init_args"]["backbone"]})
    backbone = parser.instantiate(config)["backbone"]
    paired = base["model"]["init_args"].get("context") is not None
    for plan in plans:
        try:
            plan.built.require_text_given(paired)
            plan.built.prepare(backbone)
        except UserError as error:
            at = "" if plan.compression is None else f" at {plan.compression:g}x"
            raise UserError(f"--mergers has {plan.spec.label!r}{at}: {error}") from error


def common_parts(base: dict[str, Any]) -> dict[str, Any]:
    """What all cells depend on beside merger and seed: configuration, backbone weights and shards.

    Args:
        base: the resolved configuration.

    Returns:
        JSON-like values.
    """
    config = {key: value for key, value in base.items() if key not in WITHOUT_EFFECT}
    model = dict(config["model"])
    model["init_args"] = {key: value for key, value in model["init_args"].items() if key != "merger"}
    files: list[Path] = []
    backbone = (model["init_args"].get("backbone") or {}).get("init_args") or {}
    files += sorted(Path(str(backbone.get("name_or_path"))).glob("*.safetensors"))
    root = ((config.get("data") or {}).get("init_args") or {}).get("root")
    if root is not None:
        files += sorted(Path(str(root)).glob("*/index.json"))
    digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**config, "model": model, "files": digests}
