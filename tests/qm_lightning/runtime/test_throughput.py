"""Figures of speed: what is counted, and that counting changes nothing."""

import csv
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from qm_lightning.callbacks.throughput import Throughput
from qm_lightning.merging import FixedBudget, UniformPool
from qm_lightning.runtime.flop_count import can_count, count_step
from qm_lightning.runtime.peak_flops import peak_flops
from qm_lightning.tokens import Tokens

B, N, D = 4, 12, 8


class Merging(pl.LightningModule):
    """A frozen layer, a merger from 12 to 4 tokens, a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(D, D).requires_grad_(False)
        self.merger = UniformPool(budget=FixedBudget(3.0))
        self.head = torch.nn.Linear(D, 1)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        values = self.backbone(batch["x"])
        mask = torch.ones(B, N, dtype=torch.bool)
        positions = torch.arange(N).expand(B, N)[..., None]
        merged = self.merger(Tokens(values, mask, positions))
        return self.head(merged.values)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        time.sleep(1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), 0.1)


class Slow(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A loader that training waits for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 8 * B

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds / B)
        return {"x": torch.full((N, D), i / 32), "valid": torch.tensor(i % B != 0)}


def train(folder: Path, seconds: float, **options: Any) -> list[dict[str, str]]:
    logger = CSVLogger(folder, name="", version="")
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, callbacks=[Throughput()], max_steps=8, log_every_n_steps=3,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    loader = DataLoader(Slow(seconds), batch_size=B)
    trainer.fit(
        Merging(), loader, DataLoader(Slow(0), batch_size=8 * B) if "val_check_interval" in options else None
    )
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("perf/step_s")]


def test_rates_and_the_share_of_waiting(tmp_path: Path) -> None:
    rows = train(tmp_path, seconds=0.08)
    assert [row["step"] for row in rows] == ["2", "5"]
    for row in rows:
        step = float(row["perf/step_s"])
        assert step > 0.08
        assert float(row["perf/data_wait_share"]) * step > 0.05
        assert float(row["perf/samples_per_s"]) == pytest.approx(3 / step, rel=1e-3)  # one of four is padding
        assert float(row["perf/tokens_per_s_before"]) == pytest.approx(B * N / step, rel=1e-3)
        assert float(row["perf/tokens_per_s_after"]) == pytest.approx(B * N / 3 / step, rel=1e-3)
        assert 0.05 < float(row["perf/peak_memory_gib"]) < 64
        # Frozen: forward only. Head: forward and the weights' gradient (its input needs none).
        flops = 2 * B * N * D * D + 2 * (2 * B * 4 * D)
        assert float(row["perf/gflops_per_step"]) == pytest.approx(flops / 1e9, rel=1e-6)
        assert "perf/mfu" not in row  # nobody knows this CPU's peak


def test_validation_is_not_counted_as_training(tmp_path: Path) -> None:
    rows = train(tmp_path, seconds=0.0, val_check_interval=4)
    assert float(rows[-1]["perf/step_s"]) < 0.25  # with the validation's second it would be above 0.33


class Attention(torch.nn.Module):
    """Attention over noisy inputs, with a buffer that every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        x = (batch + torch.randn_like(batch)) * self.scale
        return {"out": F.scaled_dot_product_attention(x, x, x)}


def test_attention_on_the_cpu_is_counted_and_leaves_no_trace() -> None:
    """Two products forward; the backward pass does five, one of the forward's again among them."""
    module, batch = Attention(), torch.randn(2, 3, 16, 8)
    torch.manual_seed(0)
    flops = count_step(module, batch)
    assert flops == 7 * (2 * 2 * 3 * 16 * 16 * 8)
    assert module.scale.grad is None
    assert module.calls == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
def test_compiled_parts_are_not_counted_as_nothing() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert can_count(module)
    module[0].compile()
    assert not can_count(module)


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16-mixed", False, 756.0),
        ("NVIDIA H200", "16-mixed", False, 989.4),
        ("NVIDIA B200", "bf16-true", False, 2250.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156.0),
        ("NVIDIA H100 80GB HBM3", "64-true", False, None),
        ("Some Future GPU", "bf16-mixed", False, None),
    ],
)
def test_the_peak_table(device: str, precision: str, tf32: bool, tera: float | None) -> None:
    assert peak_flops(device, precision, tf32) == (None if tera is None else tera * 1e12)


def test_every_figure_of_speed_is_explained() -> None:
    """The dashboard's page names each figure that the callback can log."""
    root = Path(__file__).parents[3]
    logged = set(re.findall(r'"(perf/\w+)"', (root / "qm_lightning/callbacks/throughput.py").read_text()))
    explained = (root / "docs/tracking.md").read_text()
    assert len(logged) >= 9
    assert not {name for name in logged if f"`{name}`" not in explained}
