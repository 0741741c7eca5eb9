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
