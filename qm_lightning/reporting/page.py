"""One experiment's part of the page, and the page."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qm_lightning.reporting import plots
from qm_lightning.reporting.columns import Column, best_rows, cell, shown
from qm_lightning.reporting.findings import OURS, Findings, find
from qm_lightning.reporting.rows import Row, put_together
from qm_lightning.reporting.runs import Run
from qm_lightning.reporting.style import looks

SAMPLES = 2  # merge pictures are laid side by side for so many samples
PLOTS: tuple[tuple[str, str, str, Callable[[Sequence[Row]], Figure | None]], ...] = (
    (
        "pareto",
        "Quality against cost",
        "Lower left is better. A line joins one method's compressions, bars show the spread over seeds, the "
        "broad grey line is the Pareto front: nothing lies below it at the same cost. The star is the run "
        "that reads all tokens.",
        plots.pareto_plot,
    ),
    (
        "tokens",
        "",
        "",
        plots.tokens_plot,
    ),  # no title: the page has it in the first plot; other documents take the file
    ("time", "Time", "Evaluation mode, one batch, median of several calls.", plots.time_plot),
    (
        "kept",
        "Tokens kept per sample",
        "A fixed budget keeps the same share of every sample; an entropy budget gives each its own number.",
        plots.kept_plot,
    ),
    ("curves", "Training", "Means over seeds, at most 60 points per curve.", plots.curves_plot),
)
LEGENDS = {
    "text": "A colour is a group of merged tokens, the underlined one its anchor; black on white stayed "
    "alone, pale grey was dropped.",
    "image": "A colour is a group of merged patches, lines lead to its anchor (the dot); patches without "
    "colour stayed alone, dark ones were dropped.",
    "video": "A colour is a group of merged patches, lines lead to its anchor (the dot); patches without "
    "colour stayed alone, dark ones were dropped. A group may reach over several frames: patches without a "
    "line belong to the anchor of that colour on another frame.",
}


@dataclass(frozen=True)
class Section:
    """One experiment, ready for the page. Attributes are what the template prints."""

    experiment: str
    anchor: str
    modality: str
    findings: Findings
    rows: list[Row]
    columns: list[Column]
    table: list[dict[str, Any]]
    split: str
    plots: list[dict[str, str]]
    pictures: list[dict[str, Any]]
    legend: str
    work: list[tuple[str, str]]
    configurations: list[tuple[str, str]]


def slug(text: str) -> str:
    """A file name made of letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def make_section(runs: Sequence[Run], out: Path) -> Section:
    """Draw one experiment's plots into a directory and gather what the page says of it.

    Args:
        runs: of one experiment.
        out: directory for the PNG files.

    Returns:
        The section.
    """
    rows = put_together(runs)
    name = runs[0].experiment
    modality = str(runs[0].raw.get("modality") or "image")
    kind = "text" if modality == "text" else "video" if modality == "video" else "image"
    columns = shown(rows)
    return Section(
        experiment=name,
        anchor=slug(name),
        modality=kind,
        findings=find(runs),
        rows=rows,
        columns=columns,
        table=_table(rows, columns),
        split=" and ".join(sorted({str(run.raw.get("split") or "test") for run in runs})),
        plots=_draw_plots(rows, name, out),
        pictures=_pictures(rows),
        legend=LEGENDS[kind],
        work=_work(runs),
        configurations=_configurations(rows),
    )


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    best = {column.key: best_rows(rows, column) for column in columns}
    return [
        {
            "method": row.method,
            "target": row.target_text,
            "seeds": len(row.runs),
            "ours": row.merger == OURS,
            "first": place > 0 and row.target != rows[place - 1].target,
            "cells": [
                {"text": cell(row, c), "best": place in best[c.key], "markable": c.best is not None}
                for c in columns
            ],
        }
        for place, row in enumerate(rows)
    ]


def _draw_plots(rows: Sequence[Row], experiment: str, out: Path) -> list[dict[str, str]]:
    drawn = []
    for name, title, explanation, draw in PLOTS:
        figure = draw(rows)
        if figure is not None:
            path = out / f"{slug(experiment)}-{name}.png"
            figure.savefig(path)
            drawn.append(
                {"title": title, "explanation": explanation, "file": path.name, "data": _encoded(path)}
            )
    return drawn


def _pictures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Merge pictures by sample, a line per compression, methods in the same order in each."""
    found: dict[str, dict[float, list[dict[str, str]]]] = {}
    first = min((row.target for row in rows if row.target is not None), default=0.0)
    place = {method: i for i, method in enumerate(looks(rows))}
    for row in sorted(rows, key=lambda row: place[row.method]):
        folder = row.runs[0].path / "report" / "examples"
        for path in (sorted(folder.glob("test-*.png")) or sorted(folder.glob("val-*.png")))[:SAMPLES]:
            lines = found.setdefault(path.stem.split("-", 2)[-1], {})
            # All tokens stand at the end of the first line, which has its own compression.
            target = first if row.target is None else row.target
            lines.setdefault(target, []).append({"caption": row.name, "data": _encoded(path)})
    return [
        {"name": name, "blocks": [lines[target] for target in sorted(lines)]}
        for name, lines in list(found.items())[:SAMPLES]
    ]


def _work(runs: Sequence[Run]) -> list[tuple[str, str]]:
    def values(key: str) -> str:
        return (
            ", ".join(sorted({str(run.raw[key]) for run in runs if run.raw.get(key) is not None}))
            or "not known"
        )

    work = [
        ("training steps", values("steps")),
        ("seeds", values("seed")),
        (f"{values('split')} samples", values("samples")),
    ]
    versions: dict[str, set[str]] = {}
    for run in runs:
        for package, version in (run.raw.get("versions") or {}).items():
            versions.setdefault(package, set()).add(str(version))
    return work + [(package, ", ".join(sorted(found))) for package, found in versions.items()]


def _configurations(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The resolved configuration of each row's first run, and where it lies."""
    texts = []
    for row in rows:
        path = row.runs[0].path / "config.yaml"
        if path.is_file():
            texts.append((f"{row.name}: {path}", path.read_text()))
    return texts


def render(sections: Sequence[Section], left_out: Sequence[str], files: Sequence[str], run_count: int) -> str:
    """The page as HTML, with its pictures inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    title = "Token merging: " + ", ".join(section.experiment for section in sections)
    return environment.get_template("page.html.jinja").render(
        title=title, sections=sections, left_out=left_out, files=files, run_count=run_count
    )
