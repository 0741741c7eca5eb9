"""The front of the command line: finds the verb, loads only what that verb needs, turns mistakes into one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from datamodules.errors import DataError, outside_environment
from qm_lightning import __version__
from qm_lightning.errors import UserError
from qm_lightning.runtime.option_errors import explain

VERBS: dict[str, tuple[str, str]] = {
    "fit": ("train", "train merger and prior on a frozen backbone (or pre-train a small backbone)"),
    "validate": ("train", "run the validation shards through a trained run"),
    "test": ("train", "run the held-out test shards and write results.json"),
    "predict": ("train", "write the predicted target sequences of the test shards"),
    "compare": ("compare", "mergers x compressions x seeds on the same work"),
    "report": ("report", "tables and pictures of finished runs: HTML, PNG and CSV"),
    "generate": ("generate", "text from a trained run"),
    "export": ("export", "safetensors + config.json from a checkpoint"),
    "doctor": ("doctor", "pre-flight: versions, devices, shards, backbone, disk, W&B, and --nodes"),
}

USAGE_ERROR = 2


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items())
    return (
        "usage: python train.py VERB [options]\n\n"
        f"{verbs}\n\n"
        "python train.py VERB --help lists a verb's options.\n"
        "python train.py fit --config configs/experiment/image.yaml trains the shipped image experiment;\n"
        "any key of a configuration can be set on the command line: --model.merger ToMe --trainer.max_steps 100."
    )


def _one_line(error: BaseException) -> str:
    return "error: " + " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments after the program's name; ``None``: those of the process.

    Returns:
        The exit code: 0, or 2 for a mistake of the user's, printed as one line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in VERBS:
        known = ", ".join(VERBS)
        print(_one_line(UserError(f"unknown verb {args[0]!r}; expected one of {known}")), file=sys.stderr)
        return USAGE_ERROR
    # The tokenizers library warns about forked data workers unless told.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = VERBS[args[0]][0]
    # The Lightning verbs share one parser, which reads the verb itself.
    given = args if command == "train" else args[1:]
    return exit_code(lambda: importlib.import_module(f"qm_lightning.commands.{command}").main(given))


def exit_code(call: Callable[[], int]) -> int:
    """What ``call`` returns; 2 for a mistake of the user's, which is printed as one line."""
    try:
        return int(call())
    except ModuleNotFoundError as error:
        print(_one_line(UserError(outside_environment(error))), file=sys.stderr)
        return USAGE_ERROR
    except (UserError, DataError, ValueError) as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(_one_line(UserError(explain(str(mistake)))), file=sys.stderr)
        return USAGE_ERROR


def _mistake(error: BaseException | None) -> UserError | DataError | None:
    """The user's mistake behind an exception, if there is one.

    jsonargparse tries every type of a union and wraps what each of them raised in a ValueError.
    """
    while error is not None:
        if isinstance(error, UserError | DataError):
            return error
        error = error.__cause__ or error.__context__
    return None
