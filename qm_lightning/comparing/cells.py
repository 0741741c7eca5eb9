"""The cells of a comparison: one run directory per merger, compression and seed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_lightning.comparing.specs import MergerSpec
from qm_lightning.errors import UserError
from qm_lightning.reporting.columns import count, nats, number
from qm_lightning.reporting.rows import KEPT, QUALITY
from qm_lightning.reporting.runs import CELL_FILE

if TYPE_CHECKING:
    from qm_lightning.comparing.plan import Plan


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        spec: the merger.
        compression: asked for; ``None``: the merger has no budget.
        seed: of weights, data order and noise.
        path: run directory.
        options: command-line options of its configuration, the same for fit and test.
        digest: hash of everything that its result depends on.
    """

    spec: MergerSpec
    compression: float | None
    seed: int
    path: Path
    options: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        """As printed: ``ToMe 4x seed 0``."""
        at = "" if self.compression is None else f" {self.compression:g}x"
        return f"{self.spec.label}{at} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What fit and test print."""
        return self.path / "log.txt"

    def note(self) -> dict[str, Any]:
        """What ``cell.json`` says; empty where there is none."""
        try:
            noted = json.loads((self.path / CELL_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def finished(self) -> bool:
        """Whether the cell was tested with this very configuration."""
        return (self.path / "results.json").is_file() and self.note().get("digest") == self.digest

    def write_note(self, **further: Any) -> None:
        """Write ``cell.json``: what the cell is, its digest, and what the caller adds."""
        content = {
            "label": self.spec.label,
            "compression": self.compression,
            "seed": self.seed,
            "digest": self.digest,
            **further,
        }
        staging = self.path / f"{CELL_FILE}.tmp"
        staging.write_text(json.dumps(content, indent=2) + "\n")
        staging.replace(self.path / CELL_FILE)

    def prepare(self) -> None:
        """Make the run directory; clear it if it is this comparison's, but of another configuration.

        Raises:
            UserError: the directory holds something that no comparison made.
        """
        if self.path.is_dir() and any(self.path.iterdir()) and self.note().get("digest") != self.digest:
            if "digest" not in self.note():
                raise UserError(
                    f"{self.path} holds files that no comparison wrote; expected an empty place; "
                    "choose another --out"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_note()

    def result(self) -> str:
        """Quality and tokens in a few words."""
        metrics = json.loads((self.path / "results.json").read_text()).get("metrics") or {}
        return f"{nats(metrics.get(QUALITY, math.nan))} nats on {count(metrics.get(KEPT, math.nan))} tokens"

    def cost(self) -> str:
        """Time per sample in a few words."""
        cost = json.loads((self.path / "results.json").read_text()).get("cost") or {}
        return f"{number(cost.get('ms_per_sample', math.nan))} ms per sample"

    def arguments(self, verb: str) -> list[str]:
        """The command line of a verb; fit goes on where an earlier one was stopped."""
        last = self.path / "checkpoints" / "last.ckpt"
        # Without a checkpoint it was stopped before its first one, or never begun.
        resume = ["--ckpt_path", "last"] if verb != "fit" or last.exists() else ["--fresh", "true"]
        return [verb, *self.options, "--run_dir", str(self.path), *resume]


def directory_name(spec: MergerSpec, compression: float | None, seed: int) -> str:
    """A readable file name that differs where the cells do."""
    at = "" if compression is None else f"-{compression:g}x"
    label = re.sub(r"[^A-Za-z0-9_.=-]+", "_", spec.label).strip("_")
    if label != spec.label:  # brackets went, so two labels might have become one
        label += "-" + hashlib.sha256(spec.label.encode()).hexdigest()[:6]
    return f"{label}{at}-seed{seed}"


def digest_of(*parts: Any) -> str:
    """Hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_cells(
    plans: Sequence[Plan], seeds: int, base: Sequence[str], out: Path, common: dict[str, Any]
) -> list[Cell]:
    """All cells, one seed after the other, so that a stopped comparison already compares.

    Args:
        plans: mergers at compressions.
        seeds: 0 to seeds - 1.
        base: options that all cells share.
        out: directory of the cells.
        common: what all cells depend on (``plan.common_parts``).

    Returns:
        The cells. The seed rules weights, data order and noise, alike for all mergers.
    """
    seeded_data = "seed" in (common["data"].get("init_args") or {})
    cells = []
    for seed in range(seeds):
        for plan in plans:
            options = [*base, *plan.options, "--seed_everything", str(seed)]
            options += ["--data.init_args.seed", str(seed)] if seeded_data else []
            options += ["--model.merger.init_args.seed", str(seed)] if plan.seeded else []
            cells.append(
                Cell(
                    plan.spec,
                    plan.compression,
                    seed,
                    out / directory_name(plan.spec, plan.compression, seed),
                    tuple(options),
                    digest_of(common, plan.merger, seed),
                )
            )
    return cells
