"""The table of a comparison in W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qm_lightning.report import Report
from qm_lightning.reporting.page import SAMPLES, Section
from qm_lightning.runtime.loggers import wandb_mode


def publish(report: Report, out: Path, options: dict[str, Any]) -> str:
    """Log each experiment's table, plots and merge pictures as one W&B run, offline where there is no key.

    Args:
        report: the finished report.
        out: directory of the comparison; W&B's files go there.
        options: ``logger`` of the configuration: ``wandb``, ``project``, ``mode``.

    Returns:
        One line that says where the table is; empty if W&B is off.
    """
    if not options.get("wandb", True):
        return ""
    mode: Any
    mode, reason = wandb_mode(options.get("mode"))
    if mode == "disabled":
        return ""
    import wandb

    with wandb.init(
        project=options.get("project") or "qm-lightning",
        name=f"compare {out.name}",
        dir=str(out),
        mode=mode,
        job_type="compare",
        settings=wandb.Settings(silent=True),
    ) as run:
        for section in report.sections:
            keys = [column.key for column in section.columns]
            names = [name for key in keys for name in (key, f"{key} std")]
            table = wandb.Table(columns=["method", "compression_target", "seeds", *names])
            for row in section.rows:
                figures = [figure for key in keys for figure in (row.mean(key), row.spread(key))]
                table.add_data(row.method, row.target, len(row.runs), *figures)
            run.log({f"compare/{section.experiment}": table})
            for plot in section.plots:
                path = report.page.parent / plot["file"]
                run.log({f"compare/{path.stem}": wandb.Image(str(path))})
            for sample, images in merge_pictures(section).items():
                shown = [wandb.Image(str(path), caption=caption) for caption, path in images]
                run.log({f"merge/{section.experiment}/{sample}": shown})
            run.summary[f"finding/{section.experiment}"] = section.findings.headline
    where = f"; upload with: wandb sync {out}/wandb/offline-run-*" if mode == "offline" else ""
    return f"W&B {mode}: {reason}{where}"


def merge_pictures(section: Section) -> dict[str, list[tuple[str, Path]]]:
    """Pictures of the first test samples, one of each row's first seed.

    Args:
        section: of one experiment.

    Returns:
        Captions and files by sample.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for row in section.rows:
        folder = row.runs[0].path / "report" / "examples"
        for path in sorted(folder.glob("test-*.png"))[:SAMPLES]:
            found.setdefault(path.stem.split("-", 2)[-1], []).append((row.name, path))
    return found
