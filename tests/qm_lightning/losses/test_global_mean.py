"""One process with batch 2B equals two with batch B: uneven token counts, padding samples and all."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qm_lightning.losses import alignment_losses, fidelity_loss, global_mean, target_loss
from qm_lightning.priors import ARPrior
from qm_lightning.tokens import MergedTokens, Tokens

B, N, K, D, T, VOCAB = 6, 8, 4, 6, 5, 7


def make_batch() -> tuple[Tokens, MergedTokens, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.arange(K) < torch.tensor([4, 1, 3, 2, 4, 4])[:, None]
    values = torch.randn(B, N, D, dtype=torch.float64)
    index = torch.arange(K).expand(B, K)
    assignment = (torch.arange(N) // 2).expand(B, N)
    assignment = assignment.masked_fill(~mask.gather(1, assignment), -1)
    size = 2.0 * mask.double()
    merged = MergedTokens(
        values[:, ::2] * mask[..., None],
        mask,
        size,
        index[..., None],
        index,
        assignment,
        (assignment >= 0).double(),
    )
    targets = torch.randint(0, VOCAB, (B, T)).masked_fill(torch.rand(B, T).cumsum(1) > 1.5, -100)
    targets[:, 0] = 1
    tokens = Tokens(values, assignment >= 0, torch.arange(N)[None, :, None].expand(B, N, 1))
    return tokens, merged, targets, torch.tensor([True, True, True, True, True, False])


def rows(data: Tokens | MergedTokens, start: int, end: int) -> Any:
    changed = {
        f.name: getattr(data, f.name)[start:end]
        for f in fields(data)
        if isinstance(getattr(data, f.name), torch.Tensor)
    }
    return replace(data, **changed)


def loss_and_gradient(start: int, end: int, distributed: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    prior = ARPrior(D, VOCAB, dim=16, depth=1, heads=2).double()
    tokens, merged, targets, valid = make_batch()
    tokens, merged, targets, valid = (
        rows(tokens, start, end),
        rows(merged, start, end),
        targets[start:end],
        valid[start:end],
    )
    model = DistributedDataParallel(prior) if distributed else prior
    output = model(merged, targets)
    parts = [
        target_loss(output.logits, targets, valid),
        *alignment_losses(output, merged, valid),
        fidelity_loss(tokens, merged, 0.8, valid),
    ]
    loss = torch.stack([global_mean(total, count) for total, count in parts])
    loss.sum().backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in prior.parameters()])


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(loss_and_gradient(3 * rank, 3 * rank + 3, distributed=True), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    want_loss, want_gradient = loss_and_gradient(0, 6, distributed=False)
    losses, gradients = zip(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True
    )
    torch.testing.assert_close(torch.stack(losses).mean(0), want_loss, rtol=0, atol=1e-6)
    for gradient in gradients:
        torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=1e-6)
    # The plain mean per rank is something else here: the test would notice it.
    assert (
        loss_and_gradient(0, 3, False)[1] + loss_and_gradient(3, 6, False)[1] - 2 * want_gradient
    ).abs().max() > 1e-3
