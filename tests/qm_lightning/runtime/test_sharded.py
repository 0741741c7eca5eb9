"""FSDP2 on gloo: it learns as DDP does, stops and resumes exactly, and a run may change between the two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Attempt, run, traced, write_shards

from qm_lightning.runtime.checkpoint_io import read_checkpoint

SHARDED = Attempt(
    world=2, strategy="fsdp2", max_steps=10, checkpoint_every=5, trainer={"gradient_clip_val": 1.0}
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def weights(checkpoint: dict[str, Any]) -> torch.Tensor:
    return torch.cat([checkpoint["state_dict"][key].flatten() for key in sorted(checkpoint["state_dict"])])


@pytest.mark.slow
def test_sharded_training_stops_resumes_and_equals_ddp(shards: Path, tmp_path: Path) -> None:
    straight = run(SHARDED, shards, tmp_path / "straight", tmp_path / "trace1")
    assert [o.code for o in straight] == [0, 0], straight[0].text
    stopped = replace(SHARDED, signal_at=(5, 1))
    first = run(stopped, shards, tmp_path / "resumed", tmp_path / "trace2")
    assert [o.code for o in first] == [75, 75], first[0].text
    second = run(replace(SHARDED, ckpt_path="last"), shards, tmp_path / "resumed", tmp_path / "trace2")
    assert [o.code for o in second] == [0, 0], second[0].text
    for rank in (0, 1):
        for key in ("state", "moments", "rate"):
            assert straight[rank].result is not None
            assert second[rank].result is not None
            assert second[rank].result[key] == straight[rank].result[key], (rank, key)
        assert traced(tmp_path / "trace2", rank) == traced(tmp_path / "trace1", rank)

    saved = read_checkpoint(tmp_path / "straight/checkpoints/last.ckpt")
    assert not [name for name in saved["state_dict"] if name.startswith("backbone.")]
    ddp = run(replace(SHARDED, strategy="ddp"), shards, tmp_path / "ddp", tmp_path / "trace3")
    assert [o.code for o in ddp] == [0, 0], ddp[0].text
    other = read_checkpoint(tmp_path / "ddp/checkpoints/last.ckpt")
    assert saved["state_dict"].keys() == other["state_dict"].keys()
    assert (weights(saved) - weights(other)).abs().max() < 1e-6

    # From the middle of the DDP run on with shards, weights and moments alike.
    middle = str(tmp_path / "ddp/checkpoints/step_00000005.ckpt")
    mixed = run(replace(SHARDED, ckpt_path=middle), shards, tmp_path / "mixed", tmp_path / "trace4")
    assert [o.code for o in mixed] == [0, 0], mixed[0].text
    changed = read_checkpoint(tmp_path / "mixed/checkpoints/last.ckpt")
    assert changed["global_step"] == 10
    assert (weights(changed) - weights(other)).abs().max() < 1e-6


@pytest.mark.slow
def test_muon_is_sharded_and_resumes(shards: Path, tmp_path: Path) -> None:
    muon = replace(SHARDED, muon=True)
    straight = run(muon, shards, tmp_path / "straight", tmp_path / "trace1")
    assert [o.code for o in straight] == [0, 0], straight[0].text
    stopped = run(replace(muon, signal_at=(5, 1)), shards, tmp_path / "resumed", tmp_path / "trace2")
    assert [o.code for o in stopped] == [75, 75], stopped[0].text
    second = run(replace(muon, ckpt_path="last"), shards, tmp_path / "resumed", tmp_path / "trace2")
    assert [o.code for o in second] == [0, 0], second[0].text
    assert second[0].result is not None
    assert straight[0].result is not None
    assert second[0].result["state"] == straight[0].result["state"]

    ddp = run(replace(muon, strategy="ddp"), shards, tmp_path / "ddp", tmp_path / "trace3")
    assert [o.code for o in ddp] == [0, 0], ddp[0].text
    saved, other = (
        read_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("straight", "ddp")
    )
    # Muon's products run in bfloat16, whose last bit is 2^-8 of a step of 0.05.
    assert (weights(saved) - weights(other)).abs().max() < 2e-3


def test_shards_need_several_processes(shards: Path, tmp_path: Path) -> None:
    outcome = run(replace(SHARDED, world=1), shards, tmp_path / "run", tmp_path / "trace")[0]
    assert outcome.code == 2
    assert "trainer.strategy=fsdp2 and no launcher" in outcome.error
