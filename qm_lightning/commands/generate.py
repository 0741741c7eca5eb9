"""``python train.py generate RUN_DIR``: text from a trained run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qm_lightning.commands.report import OneLineParser
from qm_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from qm_lightning.generation import Cost, Generation

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
    options.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a training")
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
    texts = [text.encode() for text in options.prompt] + [_read(name) for name in options.prompt_file]
    from qm_lightning.generation import Generation, Sampling
    from qm_lightning.runtime.trained_run import open_trained_run

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    run = open_trained_run(options.run_dir, options.ckpt_path, options.backbone, options.device)
    generation = Generation(
        run.module,
        _tokenize(texts, run.data),
        run.data.decode_targets,
        sampling,
        run.module.eos_id,
        options.stop,
    )
    print(f"step {run.step} of {run.checkpoint}", file=sys.stderr, flush=True)
    _show(generation)
    print(summary(generation.cost, len(generation.rows)), file=sys.stderr, flush=True)
    return 0


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(
            f"--prompt_file {name} cannot be read ({error.strerror}); expected a text file; check the path"
        ) from error


def _tokenize(texts: Sequence[bytes], data: object) -> list[Tensor]:
    """Token ids of each text, read as in training but never cut.

    Raises:
        UserError: the run has no text reader, or a text is empty or not UTF-8.
    """
    import torch

    from datamodules.text import TextDataModule

    if not isinstance(data, TextDataModule):
        raise UserError(
            f"the run was trained on {type(data).__name__}; expected TextDataModule, which knows how to read a "
            "prompt; use `train.py predict` for runs on other data"
        )
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


def _show(generation: Generation) -> None:
    """Print one continuation letter by letter; of several the first, and the others when they are done."""
    several = len(generation.rows) > 1
    shown = 0
    if several:
        print("--- prompt 1", flush=True)
    for rows in generation:
        text = generation.settled(rows[0])
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = max(shown, len(text))
    print(flush=True)
    for number, row in enumerate(generation.rows[1:], start=2):
        print(f"--- prompt {number}\n{row.text}", flush=True)


def summary(cost: Cost, prompts: int) -> str:
    """What the generation took, in one line."""
    speed = (cost.steps - 1) * prompts / cost.further_s if cost.steps > 1 else 0.0
    return (
        f"first token {cost.first_token_s:.3f} s, then {speed:.1f} tokens/s over {prompts} prompt(s); "
        f"{cost.tokens} tokens merged to {cost.merged} ({cost.tokens / max(1, cost.merged):.2f}x); "
        f"prior's cache {cost.cache_bytes / 2**10:.1f} KiB, unmerged {cost.unmerged_cache_bytes / 2**10:.1f} KiB"
    )
