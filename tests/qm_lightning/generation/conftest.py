"""Tiny trained runs over bytes, one per mode, made once per worker through the command line."""

from pathlib import Path

import pytest
import torch
from text_runs import Work

from datamodules.sources.text import prepare
from qm_lightning.backbones.small import save_backbone, small_llama
from qm_lightning.cli import main


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    root = tmp_path_factory.mktemp("text")
    prepare("stdlib", root / "data", task="passage", context_bytes=48, train=24, val=6, test=6)
    torch.manual_seed(0)
    save_backbone(small_llama(width=32, depth=2, heads=2, max_tokens=96), root / "backbone", None)
    return Work(root)


@pytest.fixture(scope="session")
def conditioning_run(work: Work) -> Path:
    prepare(
        "stdlib",
        work.root / "pairs",
        task="continuation",
        context_bytes=48,
        target_bytes=8,
        train=16,
        val=4,
        test=4,
    )
    assert main(["fit", *work.conditioning_options("conditioning")]) == 0
    return work.root / "conditioning"


@pytest.fixture(scope="session")
def streaming_run(work: Work) -> Path:
    assert main(["fit", *work.options("streaming")]) == 0
    assert main(["test", *work.options("streaming")]) == 0
    return work.root / "streaming"
