"""``python train.py generate RUN_DIR``: text from a trained run, or from an export of one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_lightning.commands.report import OneLineParser
from qm_lightning.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.text import TextDataModule
    from qm_lightning.generation import Cost, Generation, Parts

EXAMPLE = """\
example:
  python train.py generate runs/text_streaming/000 --prompt 'import os' 'def main(' --max_new_tokens 100 \\
      --temperature 0.8 --top_p 0.95 --seed 1

The text goes to standard output as it is written; what it cost goes to standard error."""


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = OneLineParser(
        prog="python train.py generate",
        description="Continue texts with a trained run. A conditioning run merges the prompt once and writes "
        "after it; a streaming run merges while it writes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a training or an export")
    options.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue")
    options.add_argument(
        "--prompt_file",
        "--prompt-file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="one text a file; - reads standard input",
    )
    options.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=128, help="(default: %(default)s)"
    )
    options.add_argument("--temperature", type=float, default=1.0, help="0 = greedy (default: %(default)s)")
    options.add_argument(
        "--top_p", "--top-p", type=float, default=1.0, help="draw from this share (default: %(default)s)"
    )
    options.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    options.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a continuation"
    )
    options.add_argument(
        "--ckpt_path", help="best, last or a file (default: best if there is one, else last)"
    )
    options.add_argument(
        "--modality",
        metavar="NAME",
        help="which part writes, where several read text (default: the only one)",
    )
    options.add_argument("--backbone", help="folder or name of the backbone, if it has moved")
    options.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    return options


def main(argv: Sequence[str]) -> int:
    """Write.

    Args:
        argv: the options after the verb.

    Returns:
        0; mistakes raise ``UserError``.
    """
    options = parser().parse_args(argv)
    # As the shell gave them: bytes that are not UTF-8 are refused further down, by one line.
    typed = [text.encode("utf-8", "surrogateescape") for text in options.prompt]
    texts = typed + [_read(name) for name in options.prompt_file]
    from qm_lightning.export import is_export
    from qm_lightning.generation import Generation, Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    writer = (_from_export if is_export(options.run_dir) else _from_run)(options)
    generation = Generation(
        writer.parts,
        _tokenize(texts, writer.data),
        writer.data.decode_targets,
        sampling,
        writer.eos_id,
        options.stop,
    )
    print(writer.origin, file=sys.stderr, flush=True)
    try:
        whole = _show(generation)
    except BrokenPipeError:  # whoever read the text has enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(summary(generation.cost, len(generation.rows)), file=sys.stderr, flush=True)
    return 0 if whole else INTERRUPTED


@dataclass(frozen=True)
class _Writer:
    """What writes, how its text is read, and where it is from."""

    parts: Parts
    data: TextDataModule
    eos_id: int | None
    origin: str


def _from_run(options: argparse.Namespace) -> _Writer:
    from datamodules.text import TextDataModule
    from qm_lightning.modules import MultimodalModule
    from qm_lightning.runtime.trained_run import open_trained_run

    run = open_trained_run(options.run_dir, options.ckpt_path, options.backbone, options.device)
    parts: Parts = run.module
    data = run.data
    if isinstance(run.module, MultimodalModule):
        texts = [name for name, part in data.parts.items() if isinstance(part, TextDataModule)]
        name = _chosen(options.modality, texts, options.run_dir)
        parts, data = run.module.view(name), data.parts[name]
    else:
        _refuse_modality(options)
    if not isinstance(data, TextDataModule):
        raise UserError(
            f"the run was trained on {type(data).__name__}; expected TextDataModule, which knows how to read "
            "a prompt; use `train.py predict` for runs on other data"
        )
    return _Writer(parts, data, run.module.eos_id, f"step {run.step} of {run.checkpoint}")


def _chosen(asked: str | None, texts: list[str], directory: Path) -> str:
    """The part that writes: the one asked for, or the only one that reads text."""
    if not texts:
        raise UserError(
            f"no part of {directory} reads text; expected one on TextDataModule, which knows how to read a prompt; "
            "use `train.py predict` for runs on other data"
        )
    if asked is None and len(texts) == 1:
        return texts[0]
    if asked not in texts:
        found = "no --modality was given" if asked is None else f"--modality {asked} was given"
        raise UserError(
            f"{found} and the parts of {directory} that read text are {', '.join(texts)}; expected one of them; "
            f"add --modality {texts[0]}"
        )
    return asked


def _refuse_modality(options: argparse.Namespace) -> None:
    if options.modality is not None:
        raise UserError(
            f"--modality {options.modality} was given and {options.run_dir} has one part only; expected no "
            "--modality; leave it out"
        )


def _from_export(options: argparse.Namespace) -> _Writer:
    from datamodules.text import TextDataModule
    from qm_lightning.export import from_pretrained
    from qm_lightning.export_files import read_config
    from qm_lightning.generation import WritingParts

    if options.ckpt_path is not None:
        raise UserError(
            f"{options.run_dir} is an export, which holds one set of weights, and --ckpt_path {options.ckpt_path} "
            "was given; expected the directory of a training; leave --ckpt_path out"
        )
    paths, name = read_config(options.run_dir).get("paths"), None
    if paths is None:
        _refuse_modality(options)
    else:
        texts = [name for name, path in paths.items() if path["backbone"]["modality"] == "text"]
        name = _chosen(options.modality, texts, options.run_dir)
    model = from_pretrained(options.run_dir, modality=name, device=options.device)
    text: dict[str, Any] | None = model.config.get("text")
    if text is None:
        raise UserError(
            f"{options.run_dir} does not say how its text is read; expected an export of a run on TextDataModule "
            "by `train.py export`; export the run again"
        )
    stored = model.config["backbone"]["name_or_path"]
    moved = options.backbone is not None and text["tokenizer"] == stored
    data = TextDataModule(
        options.run_dir,
        1,
        tokenizer=options.backbone if moved else text["tokenizer"],
        targets=text["targets"],
    )
    merger = model.merger if name is None else model.placed_merger
    parts = WritingParts(model.load_backbone(options.backbone), merger, model.prior)
    step = model.config["facts"].get("step", "?")
    return _Writer(parts, data, model.config["eos_id"], f"step {step}, exported to {options.run_dir}")


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(
            f"--prompt_file {name} cannot be read ({error.strerror}); expected a text file; check the path"
        ) from error


def _tokenize(texts: Sequence[bytes], data: TextDataModule) -> list[Tensor]:
    """Token ids of each text, read as in training but never cut.

    Raises:
        UserError: a text is not UTF-8.
    """
    import torch

    ids = []
    for number, text in enumerate(texts, start=1):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"prompt {number} is not UTF-8 ({error.reason} at byte {error.start}); expected text; convert it"
            ) from None
        ids.append(data.whole(text) if text else torch.zeros(0, dtype=torch.long))
    return ids


def _show(generation: Generation) -> bool:
    """Print one continuation letter by letter; of several the first, and the others when they are done.

    Returns:
        Whether it came to its end: Ctrl-C ends the writing, and what was written by then is shown.
    """
    several, whole = len(generation.rows) > 1, True
    shown = 0
    if several:
        print("--- prompt 1", flush=True)
    try:
        for rows in generation:
            text = generation.settled(rows[0])
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = max(shown, len(text))
    except KeyboardInterrupt:
        whole = False
    print(flush=True)
    for number, row in enumerate(generation.rows[1:], start=2):
        print(f"--- prompt {number}\n{row.text}", flush=True)
    return whole


def summary(cost: Cost, prompts: int) -> str:
    """What the generation took, in one line."""
    speed = cost.further / cost.further_s if cost.further else 0.0
    return (
        f"first token {cost.first_token_s:.3f} s, then {speed:.1f} tokens/s over {prompts} prompt(s); "
        f"{cost.tokens} tokens merged to {cost.merged} ({cost.tokens / max(1, cost.merged):.2f}x); "
        f"prior's cache {cost.cache_bytes / 2**10:.1f} KiB, unmerged {cost.unmerged_cache_bytes / 2**10:.1f} KiB"
    )
