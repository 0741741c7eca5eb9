"""All metrics together, on one process and on two with uneven batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from qm_lightning.metrics import QualityMetrics
from qm_lightning.priors import PriorOutput
from qm_lightning.tokens import MergedTokens, Tokens

N, K, D, T, VOCAB = 9, 4, 6, 5, 7


def make_batch(
    size: int, seed: int, valid: Tensor | None = None
) -> tuple[Tokens, MergedTokens, PriorOutput, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, N, D, generator=draw)
    assignment = torch.randint(-1, K, (size, N), generator=draw)
    assignment[:, :K] = torch.arange(K)
    kept = torch.randint(1, K + 1, (size,), generator=draw)
    mask = torch.arange(K) < kept[:, None]
    assignment = assignment.masked_fill(assignment >= kept[:, None], -1)
    index = torch.zeros(size, K, dtype=torch.long)
    merged = MergedTokens(
        torch.randn(size, K, D, generator=draw),
        mask,
        mask.float(),
        index[..., None],
        index,
        assignment,
        torch.ones(size, N),
    )
    tokens = Tokens(
        values, torch.ones(size, N, dtype=torch.bool), torch.arange(N)[None, :, None].expand(size, N, 1)
    )
    targets = torch.randint(0, VOCAB, (size, T), generator=draw)
    targets[:, 3:] = targets[:, 3:].masked_fill(torch.rand(size, 2, generator=draw) < 0.5, -100)
    output = PriorOutput(torch.randn(size, T, VOCAB, generator=draw))
    return tokens, merged, output, targets, torch.ones(size, dtype=torch.bool) if valid is None else valid


BATCHES = [
    [(5, 0, None), (2, 1, None)],
    [(1, 2, None), (3, 3, torch.tensor([True, False, False]))],
    [(4, 4, torch.zeros(4, dtype=torch.bool))],
]


def measured(batches: Any) -> dict[str, Tensor]:
    metrics = QualityMetrics(max_tokens=16)
    for size, seed, valid in batches:
        metrics.update(*make_batch(size, seed, valid))
    return metrics.compute()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Rank 1 has one batch more, and that one is all padding.
    values = measured(BATCHES[0] if rank == 0 else BATCHES[1] + BATCHES[2])
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_with_uneven_batches_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    want = measured([batch for rank in BATCHES for batch in rank])
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.keys() == want.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-6, msg=name)


def test_names_are_group_and_name_and_values_are_scalars() -> None:
    values = measured(BATCHES[0])
    assert {name.split("/")[0] for name in values} == {"quality", "tokens", "merged"}
    assert all(value.shape == () for value in values.values())
    assert values["tokens/compression"] == pytest.approx(
        7 * N / sum(int(make_batch(s, seed)[1].mask.sum()) for s, seed, _ in BATCHES[0])
    )


def test_reset_forgets() -> None:
    metrics = QualityMetrics(max_tokens=16)
    metrics.update(*make_batch(5, 0))
    first = metrics.compute()
    metrics.reset()
    metrics.update(*make_batch(5, 1))
    assert metrics.compute()["quality/nats"] != first["quality/nats"]
    metrics.reset()
    metrics.update(*make_batch(5, 0))
    assert metrics.compute() == first


def test_states_stay_out_of_checkpoints() -> None:
    assert QualityMetrics().state_dict() == {}
