"""What attention statistics cost, in ratios taken in one run: time per pass, time per forward, peak memory.

Claims: output + entropy cost 2.0 to 2.5 plain passes; statistics on 4 of 12 layers of a ViT-B cost at most
1.35x its plain SDPA forward; peak memory grows linearly to N = 8192. Times are the least of several
interleaved runs.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._record import write_results

MODEL = "ViT-B: width 768, 12 layers, 12 heads, random weights, fp32"
HEADS, HEAD_WIDTH, PATCH = 12, 64, 16
TIMED = [(8, 197), (2, 1024), (1, 4096)]  # batch, tokens
MEMORY_TOKENS = [1024, 2048, 4096, 8192]
FORWARD_LIMIT, PASS_LIMIT = 1.35, 2.5


def main() -> None:
    """Measure, print tables, write ``benchmarks/results/attention.json``."""
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "passes": measure_passes(),
            "forward": measure_forward(Path(folder)),
            "memory": measure_memory(Path(folder)),
        }
    path = write_results("attention", {"model": MODEL}, **results)
    _print(results)
    Console().print(f"written to {path}")


def least_times(
    functions: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each function: the least of ``repeats`` rounds, each round running all of them."""
    least = [math.inf] * len(functions)
    for function in functions:
        function()
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = clock()
            function()
            least[i] = min(least[i], clock() - start)
    return least


def materialised(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and entropy by way of the whole matrix, as one would write it without a thought."""
    matrix = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return matrix @ value, torch.special.entr(matrix).sum(-1).mean(1)


def measure_passes() -> list[dict[str, Any]]:
    """Seconds of one attention: plain, with statistics, with received attention, materialised."""
    from qm_lightning.attention import attention_with_stats

    rows = []
    for batch, n in TIMED:
        q, k, v = (torch.randn(batch, HEADS, n, HEAD_WIDTH) for _ in range(3))
        plain, stats, received, matrix = least_times(
            [
                partial(F.scaled_dot_product_attention, q, k, v),
                partial(attention_with_stats, q, k, v),
                partial(attention_with_stats, q, k, v, received=True),
                partial(materialised, q, k, v),
            ],
            repeats=7 if n < 4096 else 3,
        )
        rows.append(
            {"batch": batch, "tokens": n, "plain": plain, "statistics": stats}
            | {"with_received": received, "materialised": matrix}
        )
    return rows


@torch.no_grad()
def measure_forward(folder: Path) -> dict[str, Any]:
    """Seconds of a ViT-B forward, batch 8, 197 tokens: plain SDPA, and as ``HFBackbone``."""
    from transformers import AutoModel

    from qm_lightning.backbones import HFBackbone

    path = _save_vit(folder, (14, 14))
    pixels = torch.randn(8, 3, 14 * PATCH, 14 * PATCH)
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    ours = {
        "layers_4": HFBackbone(path, layers=4),
        "layers_12": HFBackbone(path, layers=12),
        "layers_4_received": HFBackbone(path, layers=4, received=True),
    }
    functions = [partial(model, pixels), *(partial(b, {"pixel_values": pixels}) for b in ours.values())]
    times = least_times(functions, repeats=7)
    return {"batch": 8, "tokens": 197} | dict(zip(["plain", *ours], times, strict=True))


def measure_memory(folder: Path) -> list[dict[str, Any]]:
    """MiB that one call adds at its peak, each in a process of its own."""
    rows = []
    for n in MEMORY_TOKENS:
        path = _save_vit(folder, (64, n // 64))
        row: dict[str, Any] = {"tokens": n, "matrix": HEADS * n * n * 4 / 2**20}
        for what in ("plain", "statistics", "with_received", "backbone"):
            command = f"from benchmarks.attention import probe; probe({what!r}, {n}, {path!r})"
            done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
            row[what] = float(done.stdout.split()[-1])
        rows.append(row)
    return rows


@torch.no_grad()
def probe(what: str, n: int, path: str) -> None:
    """Print how many MiB one call of ``what`` adds to this process at its peak."""
    from qm_lightning.attention import attention_with_stats

    call: Callable[[], object]
    if what == "backbone":
        from qm_lightning.backbones import HFBackbone

        backbone = HFBackbone(path, layers=4)
        backbone.fingerprint()  # reads every weight, lest a lazily mapped file count as the call's
        pixels = torch.randn(1, 3, 64 * PATCH, n // 64 * PATCH)
        call = partial(backbone, {"pixel_values": pixels})
    else:
        q, k, v = (torch.randn(1, HEADS, n, HEAD_WIDTH) for _ in range(3))
        calls: dict[str, Callable[[], object]] = {
            "plain": partial(F.scaled_dot_product_attention, q, k, v),
            "statistics": partial(attention_with_stats, q, k, v),
            "with_received": partial(attention_with_stats, q, k, v, received=True),
        }
        call = calls[what]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the high-water mark starts anew
    before = _status_mib("VmRSS")
    call()
    print(_status_mib("VmHWM") - before)


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def _save_vit(folder: Path, grid: tuple[int, int]) -> str:
    from transformers import ViTConfig, ViTModel

    size = [side * PATCH for side in grid]
    model = ViTModel(ViTConfig(image_size=size, patch_size=PATCH), add_pooling_layer=False)
    model.save_pretrained(folder)
    return str(folder)


def _print(results: dict[str, Any]) -> None:
    console = Console()
    passes = Table("batch", "tokens", "plain ms", "statistics", "with received", "materialised")
    passes.title = f"One attention, in plain passes (claim: statistics <= {PASS_LIMIT})"
    for row in results["passes"]:
        ratios = [
            f"{row[name] / row['plain']:.2f}x" for name in ("statistics", "with_received", "materialised")
        ]
        passes.add_row(str(row["batch"]), str(row["tokens"]), f"{1e3 * row['plain']:.1f}", *ratios)
    forward = results["forward"]
    whole = Table("plain ms", "4 of 12 layers", "12 of 12 layers", "4 of 12 with received")
    whole.title = f"ViT-B forward, batch 8, 197 tokens (claim: 4 of 12 layers <= {FORWARD_LIMIT}x)"
    ratios = [f"{forward[n] / forward['plain']:.3f}x" for n in ("layers_4", "layers_12", "layers_4_received")]
    whole.add_row(f"{1e3 * forward['plain']:.0f}", *ratios)
    names = ["plain", "statistics", "with_received", "backbone", "matrix"]
    memory = Table("tokens", *names)
    memory.title = "Peak MiB that one call adds, batch 1 (claim: linear; matrix = N x N of one attention)"
    for row in results["memory"]:
        memory.add_row(str(row["tokens"]), *(f"{row[name]:.0f}" for name in names))
    first, last = results["memory"][0], results["memory"][-1]
    growth = math.log(last["tokens"] / first["tokens"])
    slopes = [math.log(last[name] / first[name]) / growth for name in names]
    memory.add_row("exponent", *(f"{slope:.2f}" for slope in slopes))
    for table in (passes, whole, memory):
        console.print(table)


if __name__ == "__main__":
    main()
