"""A report of finished runs: an HTML page, PNG plots and CSV tables."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qm_lightning.errors import UserError
from qm_lightning.reporting.columns import best_rows, cell
from qm_lightning.reporting.page import Section, make_section, render
from qm_lightning.reporting.rows import QUALITY
from qm_lightning.reporting.runs import Run, find_results, read_runs

if TYPE_CHECKING:
    from rich.console import Console

PRINTED = (
    QUALITY,
    "quality/exact",
    "labels/f1",
    "labels/exact",
    "tokens/kept_mean",
    "ms_per_sample",
    "prior_flops_per_sample",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: index.html.
        sections: one per experiment.
        left_out: one line per results.json that was left out.
    """

    page: Path
    sections: list[Section]
    left_out: list[str]


def default_directory(directories: Sequence[Path]) -> Path:
    """``report`` in the one directory given, or in the closest one that holds all of them."""
    return Path(os.path.commonpath([path.resolve() for path in directories])) / "report"


def write_report(directories: Sequence[Path], out: Path | None = None) -> Report:
    """Report on all tested runs in some directories.

    Args:
        directories: run directories, or directories of them.
        out: where the report goes; ``None``: ``default_directory``.

    Returns:
        What was written: ``index.html`` (pictures inside), ``EXPERIMENT-*.png``, ``runs.csv`` (one row a run)
        and ``summary.csv`` (means and spreads over seeds).

    Raises:
        UserError: a directory is missing or holds no results, or the report cannot be written.
    """
    runs, left_out = read_runs(find_results(directories))
    out = out or default_directory(directories)
    try:
        out.mkdir(parents=True, exist_ok=True)
        experiments: dict[str, list[Run]] = {}
        for run in runs:
            experiments.setdefault(run.experiment, []).append(run)
        sections = [make_section(members, out) for members in experiments.values()]
        _write_runs(runs, out / "runs.csv")
        _write_summary(sections, out / "summary.csv")
        files = ["runs.csv", "summary.csv", *(plot["file"] for section in sections for plot in section.plots)]
        page = out / "index.html"
        page.write_text(render(sections, left_out, files, len(runs)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out}: {error}; choose another place with --out"
        ) from error
    return Report(page, sections, left_out)


def _write_runs(runs: Sequence[Run], path: Path) -> None:
    figures = sorted({name for run in runs for name in run.values})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["experiment", "method", "compression_target", "seed", "steps", "samples", *figures, "run_dir"]
        )
        for run in runs:
            known = [
                run.experiment,
                run.method,
                run.target,
                run.seed,
                run.raw.get("steps"),
                run.raw.get("samples"),
            ]
            writer.writerow([*known, *(run.values.get(name) for name in figures), run.path])


def _write_summary(sections: Sequence[Section], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = sorted(
            {name for section in sections for row in section.rows for run in row.runs for name in run.values}
        )
        heads = [head for key in keys for head in (f"{key} mean", f"{key} std")]
        writer.writerow(["experiment", "method", "compression_target", "seeds", *heads])
        for section in sections:
            for row in section.rows:
                figures = [figure for key in keys for figure in (row.mean(key), row.spread(key))]
                texts = ["" if figure != figure else figure for figure in figures]
                writer.writerow([section.experiment, row.method, row.target, len(row.runs), *texts])


def print_report(report: Report, console: Console) -> None:
    """Print headline and table of each experiment, and where the page lies."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    for section in report.sections:
        columns = [column for column in section.columns if column.key in PRINTED]
        table = Table(
            title=section.experiment,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("method", overflow="fold", min_width=11)
        for column in columns:
            table.add_column(column.title.replace(" ", "\n", 1), justify="right", no_wrap=True)
        best = {column.key: best_rows(section.rows, column) for column in columns}
        for place, row in enumerate(section.rows):
            if place and row.target != section.rows[place - 1].target:
                table.add_section()
            texts = [cell(row, column, short=column.key != QUALITY) for column in columns]
            marked = [
                f"[bold green]{text}[/]" if place in best[column.key] else text
                for text, column in zip(texts, columns, strict=True)
            ]
            table.add_row(escape(row.name), *marked)
        console.print(table)
        console.print(escape(section.findings.headline), highlight=False)
        for line in section.findings.caveats:
            console.print(f"note: {escape(line)}", style="yellow", highlight=False)
    for line in report.left_out:
        console.print(f"left out: {escape(line)}", style="yellow", highlight=False)
    console.print(f"report: {escape(str(report.page))}", highlight=False, soft_wrap=True)
