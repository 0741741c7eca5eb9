"""fit, validate, test and predict: LightningCLI over our modules and the DataModules."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import datamodules.image
import datamodules.mixture
import datamodules.paired
import datamodules.text
import datamodules.video  # noqa: F401  # makes the short class names known: --data TextDataModule
from datamodules.processing.pretrained import read_model_json
from datamodules.processing.tokenizer import BYTES
from datamodules.resumable import ResumableDataModule
from qm_lightning.backbones import HFBackbone
from qm_lightning.callbacks.model_summary import TrainedAndFrozen
from qm_lightning.callbacks.pictures import MergePictures
from qm_lightning.callbacks.progress_bar import TrainingBar
from qm_lightning.callbacks.run_record import CheckpointArtifacts
from qm_lightning.errors import UserError
from qm_lightning.modules import QuickMergeModule
from qm_lightning.modules.multimodal import BackboneSet
from qm_lightning.packaged import packaged_model
from qm_lightning.results import write_predictions, write_results
from qm_lightning.runtime.allowed_imports import limit_imports
from qm_lightning.runtime.assemble import always_on_callbacks, trainer_arguments
from qm_lightning.runtime.known_warnings import silence_false_alarms
from qm_lightning.runtime.load_weights import load_weights
from qm_lightning.runtime.loggers import TrackingOptions, make_loggers
from qm_lightning.runtime.lost_rank import EXIT_CODE as LOST_RANK
from qm_lightning.runtime.lost_rank import describe_loss
from qm_lightning.runtime.option_errors import explain, name_arguments
from qm_lightning.runtime.publish_results import publish_results
from qm_lightning.runtime.rank_facts import collect_facts, require_same
from qm_lightning.runtime.run_directory import Policy, RunDirectory, open_run_directory
from qm_lightning.runtime.wandb_run import RunLogger
from qm_lightning.runtime.world import resolve_world


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without the usage of two hundred options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with exit code 2."""
        if "unrecognized" in message:
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(explain(message, known))
        # A parser of a class's arguments raises this inside another parser, which adds where the class stands.
        taken = [action.dest for action in self._actions if action.dest.isidentifier()]
        raise UserError(" ".join(name_arguments(message, taken).split()))


class QuickMergeCLI(LightningCLI):
    """LightningCLI with a run directory, a strategy taken from the launcher and callbacks that are always on."""

    def __init__(self, args: Sequence[str]) -> None:
        limit_imports()
        silence_false_alarms()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            # Lightning warns of arguments given twice, even where they are the same.
            args=None if list(args) == sys.argv[1:] else list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Refuse abbreviations: ``--trainer.max_step`` must not mean ``max_steps``."""
        kwargs.setdefault("allow_abbrev", False)
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run, beside those of trainer, model and data."""
        parser.add_argument(
            "--name", type=str, default="run", help="Name of the experiment: runs/NAME/VERSION."
        )
        parser.add_argument("--run_dir", type=str | None, default=None, help="Exact run directory.")
        parser.add_argument(
            "--fresh",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Start anew in a run directory with history.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=100,
            help="Optimizer steps between checkpoints step_*.ckpt.",
        )
        parser.add_argument(
            "--resume_policy",
            type=Policy,
            default="exact",
            help="What --ckpt_path restores: all, the weights only, or all but the learning-rate schedule.",
        )
        parser.add_class_arguments(TrackingOptions, "logger")
        parser.link_arguments(
            "data",
            "model.init_args.vocab_size",
            compute_fn=vocab_size,
            apply_on="instantiate",
        )
        parser.link_arguments("data", "model.init_args.eos_id", compute_fn=eos_id, apply_on="instantiate")
        parser.groups["data"].title = "Shards, batches and their order"
        parser.set_defaults({"trainer.use_distributed_sampler": False, "trainer.logger": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's, less a warning against arguments from a program: ours are the command line's."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's stored values overrule the command line here; ours does not."""

    def before_instantiate_classes(self) -> None:
        """Open the run directory; give backbone and data the same processor."""
        config = self.config[self.config["subcommand"]]
        share_processor(config)
        self.run: RunDirectory = open_run_directory(
            config.run_dir,
            config.name,
            verb=self.config["subcommand"],
            ckpt_path=config.get("ckpt_path"),
            fresh=config.fresh,
            policy=config.resume_policy,
            accelerator=config.trainer.accelerator,
        )
        config.ckpt_path, config.weights_only = self.run.ckpt_path, True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose sizes come from the launcher and whose callbacks keep the run resumable."""
        config = self.config[self.subcommand]
        options = self.config_init[self.subcommand].trainer
        self._dump_config()
        require_readable(self.model, self.datamodule)
        self._compare_ranks()
        for checkpoint in filter(None, (self.run.ckpt_path, self.run.initial_weights)):
            load_weights(
                self.model, checkpoint
            )  # one that does not fit must not leave its configuration in the run
        if self.subcommand == "fit" and not options.fast_dev_run:
            options.callbacks = [*(options.callbacks or []), *self._callbacks(config)]
            self.run.write_config(self.config_dump)
            options.logger = make_loggers(self.run, config.name, config.logger, self.config_dump)
        elif self.subcommand == "test":
            options.callbacks = [*(options.callbacks or []), *self._pictures()]
        options.callbacks = [*(options.callbacks or []), *terminal_callbacks(options)]
        return super().instantiate_trainer(
            default_root_dir=str(self.run.path), **trainer_arguments(options), **kwargs
        )

    def _compare_ranks(self) -> None:
        """A short pre-flight: the same versions, configuration and data on every rank, or no start."""
        world = resolve_world(os.environ)
        if world.size > 1:
            data = self.datamodule.fingerprint() if isinstance(self.datamodule, ResumableDataModule) else "-"
            require_same(collect_facts(world, self.config_dump, data))

    def _callbacks(self, config: Any) -> list[Callback]:
        callbacks = always_on_callbacks(
            self.run, seed=config.seed_everything, checkpoint_every=config.checkpoint_every
        )
        if config.logger.wandb and config.logger.artifacts:
            callbacks.append(CheckpointArtifacts(self.run))
        return [*callbacks, *self.datamodule.callbacks(), *self._pictures()]

    def _pictures(self) -> list[Callback]:
        merges = isinstance(self.model, QuickMergeModule)
        return [MergePictures(self.run.path / "report" / "examples")] if merges else []

    def after_fit(self) -> None:
        """End the W&B run of a training that came to its end."""
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.close()

    def after_test(self) -> None:
        """Write results.json: quality, cost and configuration of the tested run; show them in its W&B run."""
        if isinstance(self.model, QuickMergeModule):
            # The command that tests need not say how long was trained.
            steps = (self.run.written_config() or self.config_dump)["trainer"]["max_steps"]
            write_results(self.run.path, self.config_dump, self.trainer, self.model, self.datamodule, steps)
            config = self.config[self.subcommand]
            if self.trainer.is_global_zero:
                publish_results(self.run, config.name, config.logger)

    def predict(self, **kwargs: Any) -> None:
        """Write the predicted target sequences, in the order of the shards."""
        batches = self.trainer.predict(**kwargs)
        write_predictions(self.run.path, batches or [], self.trainer, self.datamodule)


def vocab_size(data: Any) -> int:
    """Size of the targets' vocabulary; a name that ``--help`` can show, which a lambda has not."""
    size: int = data.vocab_size
    return size


def eos_id(data: Any) -> int:
    """The targets' end token; likewise."""
    end: int = data.eos_id
    return end


def terminal_callbacks(options: Any) -> list[Callback]:
    """Progress bar and model summary, unless they are switched off or a configuration brings its own.

    Args:
        options: ``trainer`` of the configuration: ``callbacks``, ``enable_progress_bar``, ``enable_model_summary``.
    """
    chosen = options.get("callbacks") or []
    shown: list[Callback] = []
    if options.get("enable_progress_bar") is not False and not any(
        isinstance(c, ProgressBar) for c in chosen
    ):
        shown.append(TrainingBar())
    if options.get("enable_model_summary") is not False and not any(
        isinstance(c, ModelSummary) for c in chosen
    ):
        shown.append(TrainedAndFrozen())
    return shown


def share_processor(config: Any) -> None:
    """Let the data prepare inputs as the backbone was trained; refuse a disagreement.

    Raises:
        UserError: the data names another processor or tokenizer than the backbone.
    """
    paths, parts = config.get("model.init_args.paths") or {}, config.get("data.init_args.parts") or {}
    for name in paths.keys() & parts.keys():
        _share(paths[name].backbone, parts[name].init_args, f"data.parts.{name}")
    backbone = config.get("model.init_args.backbone")
    if backbone is not None:
        _share(backbone, config.data.init_args, "data")


def _share(backbone: Any, data: Any, where: str) -> None:
    name = backbone.get("init_args", {}).get("name_or_path")
    if name is not None:
        name = backbone.init_args.name_or_path = packaged_model(name)
    for key in ("processor", "tokenizer"):
        if name is None or key not in data:
            continue
        if key == "tokenizer" and data[key] in (None, BYTES):
            data[key] = _reading(name, backbone.init_args.get("download", False), data[key], where)
        elif data[key] is None or (isinstance(data[key], str) and packaged_model(data[key]) == name):
            data[key] = name
        elif data[key] not in (name, BYTES) and not isinstance(data[key], int | dict):
            raise UserError(
                f"{where}.{key} is {data[key]!r} but the backbone is {name!r}; expected the same, "
                f"since inputs must be prepared as the backbone was trained; leave {where}.{key} out"
            )


def _reading(name: str, download: bool, asked: str | None, where: str) -> str:
    """The tokenizer of a backbone, or bytes if it has none.

    Raises:
        UserError: bytes were asked for a backbone that was trained on tokens: their ids mean something else.
    """
    files = ("tokenizer_config.json", "tokenizer.json")
    if all(read_model_json(name, file, download) is None for file in files):
        return BYTES
    if asked is None:
        return name
    raise UserError(
        f"{where}.tokenizer is {BYTES!r} but the backbone {name!r} has a tokenizer of its own; expected inputs as "
        f"it was trained on; leave {where}.tokenizer out, or give --{where}.tokenizer {name}"
    )


def require_readable(model: LightningModule, data: LightningDataModule) -> None:
    """Refuse, before anything is written, data that the backbone cannot read.

    Raises:
        UserError: text for a backbone of pictures, the other way round, or texts longer than its maximum.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, HFBackbone):
        _require_readable(backbone, data, "data")
    elif isinstance(backbone, BackboneSet):
        for name, part in getattr(data, "parts", {}).items():
            if isinstance(own := dict(backbone.items()).get(name), HFBackbone):
                _require_readable(own, part, f"data.parts.{name}")


def _require_readable(backbone: HFBackbone, data: Any, where: str) -> None:
    given = getattr(data, "modality", None)
    if given not in _CONTENT:
        return
    if (backbone.modality == "text") != (given == "text"):
        raise UserError(
            f"{where}: {type(data).__name__} gives {_CONTENT[given]} but {backbone.name_or_path!r} is a backbone for "
            f"{backbone.modality}; expected the same; choose other data, or another backbone"
        )
    longest = getattr(data, "context_length", None)
    if backbone.max_tokens is not None and longest is not None and longest > backbone.max_tokens:
        raise UserError(
            f"{where}.context_length is {longest} but {backbone.name_or_path!r} takes {backbone.max_tokens} tokens; "
            f"expected at most that; give --{where}.context_length {backbone.max_tokens}, or choose another backbone"
        )


_CONTENT = {"text": "text", "image": "pictures", "video": "clips", "paired": "pictures with their text"}


def main(argv: Sequence[str], cli: type[QuickMergeCLI] = QuickMergeCLI) -> int:
    """Run a Lightning verb.

    Args:
        argv: the verb and its options.
        cli: the command line that runs it.

    Returns:
        0, or 1 if another rank was lost; mistakes raise ``UserError``.
    """
    try:
        cli(argv)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        line = describe_loss(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        return LOST_RANK
    return 0
