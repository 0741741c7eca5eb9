"""Published algorithms written down plainly, for whole batches of equal length without padding: the rivals in speed.

Each takes values [B,N,D], metric [B,N,M], a score [B,N] and K, and gives [B,K,D]; order, sizes and provenance,
which the project's mergers keep beside, are left out, so the plain ones have less to do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B,N,D] at [B,K]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def matching(metric: Tensor, removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's: the even tokens that go, those that stay, and the odd tokens that the first ones join."""
    unit = F.normalize(metric, dim=-1)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)
    source = order[:, :removed]
    return source, order[:, removed:], partner.gather(1, source)


def joined(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The odd tokens, averaged with the even ones that join them."""
    index = target.unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values[:, 1::2].scatter_reduce(1, index, rows(values[:, ::2], source), "mean", include_self=True)


def tome(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """One bipartite matching; at most half of the tokens go."""
    source, stays, target = matching(metric, values.shape[1] - keep)
    return torch.cat([rows(values[:, ::2], stays), joined(values, source, target)], 1)


def tofu(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """ToMe with the largest norm of each group."""
    source, stays, target = matching(metric, values.shape[1] - keep)
    norm = values.norm(dim=-1)
    largest = norm[:, 1::2].scatter_reduce(1, target, norm[:, ::2].gather(1, source), "amax")
    merged = F.normalize(joined(values, source, target), dim=-1) * largest.unsqueeze(-1)
    return torch.cat([rows(values[:, ::2], stays), merged], 1)


def pitome(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """The tokens of highest energy, alternately."""
    unit = F.normalize(metric, dim=-1)
    similarity = unit @ unit.mT
    order = F.elu(similarity - 0.5).mean(-1).argsort(dim=-1, descending=True)
    removed = values.shape[1] - keep
    source, target, stays = (
        order[:, : 2 * removed : 2],
        order[:, 1 : 2 * removed : 2],
        order[:, 2 * removed :],
    )
    partner = (rows(unit, source) @ rows(unit, target).mT).argmax(-1)
    index = partner.unsqueeze(-1).expand(-1, -1, values.shape[-1])
    merged = rows(values, target).scatter_reduce(1, index, rows(values, source), "mean", include_self=True)
    return torch.cat([rows(values, stays), merged], 1)


def evit(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """The highest scores, and the sum of the others."""
    order = score.argsort(dim=-1, descending=True)
    rest = order[:, keep - 1 :]
    fused = (score.gather(1, rest).unsqueeze(-1) * rows(values, rest)).sum(1, keepdim=True)
    return torch.cat([rows(values, order[:, : keep - 1]), fused], 1)


def scope(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """Greedy, a pass over the whole similarity matrix per pick."""
    unit = F.normalize(metric, dim=-1)
    similarity = unit @ unit.mT
    cover = similarity.new_zeros(similarity.shape[:2])
    chosen = torch.zeros_like(cover, dtype=torch.bool)
    for _ in range(keep):
        gain = (similarity - cover.unsqueeze(-1)).clamp(min=0).sum(1)
        pick = (gain * score).masked_fill(chosen, -1.0).argmax(1, keepdim=True)
        chosen = chosen.scatter(1, pick, True)
        cover = cover.maximum(
            similarity.gather(2, pick.unsqueeze(1).expand(-1, cover.shape[1], 1)).squeeze(-1)
        )
    return values[chosen].view(values.shape[0], keep, -1)


def trim_tokenator(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """The second stage, with the similarity matrix held."""
    unit = F.normalize(metric, dim=-1)
    similarity = unit @ unit.mT
    total = similarity.mean(1)
    summed = torch.zeros_like(total)
    chosen = torch.zeros_like(total, dtype=torch.bool)
    for _ in range(keep):
        pick = total.masked_fill(chosen, float("inf")).argmin(1, keepdim=True)
        chosen = chosen.scatter(1, pick, True)
        summed = summed + similarity.gather(1, pick.unsqueeze(-1).expand(-1, 1, total.shape[1])).squeeze(1)
        total = summed
    return values[chosen].view(values.shape[0], keep, -1)


def top_k(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """The highest scores, in order: also what RandomPrune and DynamicViT end with."""
    return rows(values, score.topk(keep, dim=-1).indices.sort(dim=-1).values)


def average_pool(values: Tensor, metric: Tensor, score: Tensor, keep: int) -> Tensor:
    """Contiguous blocks of a text."""
    return F.adaptive_avg_pool1d(values.mT, keep).mT
