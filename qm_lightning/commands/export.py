"""``python train.py export RUN_DIR --out DIR``: safetensors + config.json from a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qm_lightning.commands.report import OneLineParser
from qm_lightning.errors import UserError

EXAMPLE = """\
example:
  python train.py export runs/text_streaming/000 --ckpt_path best --out exported/text_streaming"""


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = OneLineParser(
        prog="python train.py export",
        description="Write merger and prior of a run as model.safetensors, config.json and a model card. The "
        "backbone is named by id and fingerprint.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="directory of a training")
    options.add_argument("--run_dir", dest="named", type=Path, metavar="RUN_DIR", help="the same, by name")
    options.add_argument(
        "--ckpt_path", help="best, last or a file (default: best if there is one, else last)"
    )
    options.add_argument("--out", type=Path, required=True, help="new directory of the export")
    options.add_argument("--backbone", help="folder or name of the backbone, if it has moved")
    options.add_argument("--overwrite", action="store_true", help="replace an export that lies there")
    return options


def main(argv: Sequence[str]) -> int:
    """Export.

    Args:
        argv: the options after the verb.

    Returns:
        0; mistakes raise ``UserError``.
    """
    options = parser().parse_args(argv)
    run_dir = options.run_dir or options.named
    if run_dir is None:
        raise UserError(
            "found no RUN_DIR; expected the directory of a training; train.py export RUN_DIR --out DIR"
        )
    from qm_lightning.export import save_pretrained
    from qm_lightning.runtime.trained_run import open_trained_run

    run = open_trained_run(run_dir, options.ckpt_path, options.backbone)
    facts: dict[str, Any] = {
        "experiment": run.config.get("name"),
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "seed": run.config.get("seed_everything"),
        "metrics": _metrics(run_dir),
    }
    out = save_pretrained(
        run.module, options.out, facts=facts, text=_text(run.config["data"]), overwrite=options.overwrite
    )
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    print(f"exported step {run.step} of {run.checkpoint} to {out} ({size:.1f} MiB)")
    return 0


def _text(data: dict[str, Any]) -> dict[str, Any] | None:
    """How a run on text reads and writes it, by the name of the part in a mixture; ``None``: other data."""
    kind, options = data["class_path"].rpartition(".")[2], data["init_args"]
    if kind == "MixtureDataModule":
        parts = {name: _text(part) for name, part in options["parts"].items()}
        return {name: text for name, text in parts.items() if text is not None}
    if kind != "TextDataModule":
        return None
    return {"tokenizer": options.get("tokenizer", "bytes"), "targets": options.get("targets", "stored")}


def _metrics(run_dir: Path) -> dict[str, float]:
    """Of the run's test, if it was tested; under the names of the modalities if there are several."""
    files = {"": run_dir / "results.json"}
    files |= {f"{file.parent.name}/": file for file in sorted(run_dir.glob("*/results.json"))}
    found: dict[str, float] = {}
    for modality, file in files.items():
        try:
            metrics = json.loads(file.read_text())["metrics"]
        except (OSError, ValueError, KeyError):
            continue
        found |= {f"{modality}{name}": float(value) for name, value in metrics.items()}
    return found
