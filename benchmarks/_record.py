"""What every benchmark writes down beside its figures."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Versions and threads that figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_results(name: str, configuration: dict[str, Any], **figures: Any) -> Path:
    """Write ``benchmarks/results/NAME.json``.

    Args:
        name: of the benchmark.
        configuration: of this run; that of the machine is added.
        figures: what was measured.
    """
    path = RESULTS / f"{name}.json"
    content = {"configuration": machine() | configuration, **figures}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def earlier_results(name: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """Figures that ``write_results`` wrote under the same configuration; for benchmarks that run in parts.

    Args:
        name: of the benchmark.
        configuration: of this run, as for ``write_results``.
    """
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = json.loads(json.dumps(machine() | configuration))
    return found if found.pop("configuration", None) == now else {}
