"""Labels out of a ``LabelPrior``: all at once (one-shot sampling), or one after the other (greedy)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.label_prior import LabelPrior
from qm_lightning.priors.sampling import finite
from qm_lightning.tokens import MergedTokens


@dataclass(frozen=True)
class Branches:
    """Strands of tokens that were decoded side by side.

    Attributes:
        tokens: [B,R,L] long; a finished strand ends with SEP and is padded with it.
        scores: [B,R] float, log-probability of the strand, SEP included.
        finished: [B,R] bool, it reached SEP.
        steps: passes through the prior, that of the prefix included.
    """

    tokens: Tensor
    scores: Tensor
    finished: Tensor
    steps: int


@torch.no_grad()
def one_shot(
    prior: LabelPrior, merged: MergedTokens, top_k: int = 10, max_tokens: int = 20, branch_tokens: int = 1
) -> Branches:
    """Take the likeliest first tokens and extend them all in parallel, greedily, until SEP.

    The prefix is read once; its keys and values serve all branches.

    Args:
        prior: the prior, in evaluation mode.
        merged: the prefix.
        top_k: branches.
        max_tokens: of a branch, SEP included.
        branch_tokens: tokens at which branches may still split, by score over all of them. 1 is the paper's
            method; more finds labels that begin alike (needed where a token is a byte).

    Returns:
        ``min(top_k, V)`` branches.

    Raises:
        UserError: bad settings, or logits that are not finite.
    """
    if min(top_k, max_tokens, branch_tokens) < 1:
        raise UserError(
            f"top_k={top_k}, max_tokens={max_tokens}, branch_tokens={branch_tokens}; expected 1 or more; "
            "raise them"
        )
    branches = min(top_k, prior.vocab_size)
    logits, cache, start = prior.read_prefix(merged, branches * max_tokens)
    prefix = cache.extent
    scores, last = _log_probabilities(logits).topk(branches, dim=-1)
    tokens = last.unsqueeze(-1)
    own = torch.eye(branches, dtype=torch.bool, device=last.device)
    everything = torch.ones(branches, prefix, dtype=torch.bool, device=last.device)
    for step in range(1, max_tokens):
        finished = last == prior.sep_id
        if bool(finished.all()):
            break
        mask = torch.cat([everything, own.repeat(1, step)], dim=1)
        positions = (start + step - 1)[:, None].expand_as(last)
        following = _log_probabilities(prior.read_labels(last, positions, mask, cache))
        following = _only_sep(following, finished, prior.sep_id)
        if step < branch_tokens:
            scores, parent, last = _split(scores, following)
            tokens = tokens.gather(1, parent.unsqueeze(-1).expand_as(tokens))
            _follow(cache, prefix, parent)
        else:
            best, last = following.max(dim=-1)
            scores = scores + best
        tokens = torch.cat([tokens, last.unsqueeze(-1)], dim=-1)
    return Branches(tokens, scores, last == prior.sep_id, tokens.shape[-1])


def _log_probabilities(logits: Tensor) -> Tensor:
    logits = finite(logits)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def _only_sep(following: Tensor, finished: Tensor, sep_id: int) -> Tensor:
    """Let a finished branch [B,R] go on with SEP at no cost; following [B,R,V] log-probabilities."""
    stay = torch.full_like(following[0, 0], -torch.inf)
    stay[sep_id] = 0.0
    return torch.where(finished.unsqueeze(-1), stay, following)


def _split(scores: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The R best continuations of all branches: scores, branches they continue, tokens; [B,R] each."""
    vocabulary = following.shape[-1]
    joint = (scores.unsqueeze(-1) + following).flatten(1)
    best, index = joint.topk(scores.shape[1], dim=-1)
    return best, index // vocabulary, index % vocabulary


def _follow(cache: KVCache, prefix: int, parent: Tensor) -> None:
    """Give each branch the keys and values of the branch [B,R] that it continues."""
    branches = parent.shape[1]
    for held in (cache.keys, cache.values):
        part = held[:, :, :, prefix : cache.extent]
        strands = part.reshape(*part.shape[:3], -1, branches, part.shape[-1])
        index = parent[None, :, None, None, :, None].expand_as(strands)
        held[:, :, :, prefix : cache.extent] = strands.gather(4, index).flatten(3, 4)


@torch.no_grad()
def greedy_labels(prior: LabelPrior, merged: MergedTokens, max_tokens: int) -> Tensor:
    """Write one label after the other, each token the likeliest: what one-shot sampling is compared with.

    For priors of the ``repo`` variant, which learn what follows a SEP. They never learn to stop.

    Args:
        prior: the prior, in evaluation mode.
        merged: the prefix.
        max_tokens: tokens, SEPs included.

    Returns:
        [B,max_tokens] long.

    Raises:
        UserError: the prior is of the strict variant, or its logits are not finite.
    """
    if prior.variant != "repo":
        raise UserError(
            "greedy decoding one label after another needs a prior of variant=repo, found strict, which "
            "learns first tokens at the anchor only; use one_shot"
        )
    logits, cache, start = prior.read_prefix(merged, max_tokens)
    token = _log_probabilities(logits).argmax(dim=-1, keepdim=True)
    tokens = token
    prefix = torch.ones(token.shape[0], cache.extent, dtype=torch.bool, device=token.device)
    for step in range(1, max_tokens):
        ends = (tokens == prior.sep_id).long()
        label = ends.cumsum(dim=1) - ends
        mask = torch.cat([prefix, label == label[:, -1:]], dim=1)[:, None, None]
        logits = prior.read_labels(token, (start + step - 1)[:, None], mask, cache)
        token = _log_probabilities(logits).argmax(dim=-1)
        tokens = torch.cat([tokens, token], dim=1)
    return tokens


def scored_labels(
    branches: Branches,
    sep_id: int,
    decode: Callable[[Tensor], str],
    min_score: float = 0.0,
    min_ratio: float = 0.0,
) -> list[list[tuple[str, float]]]:
    """Read the branches of each sample as labels; branches that decode to one string are one label.

    Args:
        branches: of B samples. Those that did not reach SEP are no labels, nor are empty ones.
        sep_id: SEP.
        decode: a label's tokens, long [<=L] without SEP, as a string.
        min_score: labels of a smaller probability are left out.
        min_ratio: so are those less likely than this share of the likeliest. The labels of a sample share one
            probability of 1, so each of four has 0.25 at most: a fixed limit is too strict for many labels, or
            too lax for one.

    Returns:
        For each sample its labels and their summed probabilities, the likeliest first.
    """
    rows: list[list[tuple[str, float]]] = []
    tokens, finished = branches.tokens.cpu(), branches.finished.tolist()
    probabilities = branches.scores.exp().tolist()
    lengths = (tokens != sep_id).sum(dim=-1).tolist()
    for b, sample in enumerate(tokens):
        sums: dict[str, float] = {}
        for r, strand in enumerate(sample):
            if finished[b][r] and lengths[b][r] and (label := decode(strand[: lengths[b][r]]).strip()):
                sums[label] = sums.get(label, 0.0) + probabilities[b][r]
        ranked = sorted(sums.items(), key=lambda item: -item[1])
        limit = max(min_score, min_ratio * ranked[0][1]) if ranked else 0.0
        rows.append([(label, score) for label, score in ranked if score >= limit])
    return rows
