"""``python train.py report RUN_DIR...``: tables and pictures of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qm_lightning.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Mistakes become ``UserError``: one line, without the usage before it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing the usage and leaving."""
        raise UserError(f"{message}; {self.prog} --help lists the options")


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = OneLineParser(
        prog="python train.py report",
        description="Compare finished runs: index.html with tables, plots and merge pictures; PNG; CSV.",
        allow_abbrev=False,
    )
    options.add_argument(
        "run_dirs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="a tested run, or a directory that holds such runs",
    )
    options.add_argument(
        "--out", type=Path, help="where the report goes (default: report/ in what holds all RUN_DIRs)"
    )
    return options


def main(argv: Sequence[str]) -> int:
    """Write the report and print its table.

    Args:
        argv: the options after the verb.

    Returns:
        0; mistakes raise ``UserError``.
    """
    options = parser().parse_args(argv)
    from qm_lightning import terminal
    from qm_lightning.report import print_report, write_report

    print_report(write_report(options.run_dirs, options.out), terminal.console())
    return 0
