"""One-shot sampling against the packed forward pass and against all strings of a tiny vocabulary."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from prior_cases import make_merged
from test_label_prior import SEP, make_prior, rows

from qm_lightning.errors import UserError
from qm_lightning.priors import Branches, greedy_labels, one_shot, scored_labels


def test_scores_are_those_of_the_packed_pass() -> None:
    prior = make_prior()
    merged = make_merged([4, 6], padding=1)
    found = one_shot(prior, merged, top_k=7, max_tokens=5)
    assert found.tokens.shape[:2] == (2, 7)
    assert found.steps == found.tokens.shape[2] <= 5
    for b in range(2):
        alone = make_merged([4]) if b == 0 else merged
        for r in range(7):
            strand = found.tokens[b, r]
            end = int((strand != SEP).sum())
            targets = torch.cat([strand[:end], torch.tensor([SEP])]) if found.finished[b, r] else strand
            batch = targets.expand(len(alone.mask), -1)
            scores = prior(alone, batch).log_likelihood(batch)[b]
            torch.testing.assert_close(found.scores[b, r], scores.sum(), atol=1e-5, rtol=0)
            # every token but the first is the likeliest one
            logits = prior(alone, batch).logits[b]
            assert (logits.argmax(-1)[1:] == batch[b][1:]).all()


def test_all_strings_sum_to_at_most_one() -> None:
    torch.manual_seed(1)
    prior = make_prior(prompt=())
    small = torch.tensor([0, 1, SEP])
    # a vocabulary of two tokens and SEP: the others get no probability
    with torch.no_grad():
        prior.head.weight[[2, 3, 4, 5]] = 0.0
        prior.head.weight[:, 0] += 1.0
    prior.head.register_forward_hook(
        lambda _, __, logits: logits + torch.full((7,), -1e9).index_fill(0, small, 0.0).double()
    )
    merged = make_merged([4])
    totals, best = [], {}
    for length in range(1, 7):
        total = 0.0
        for body in itertools.product((0, 1), repeat=length - 1):
            targets = rows([list(body)])
            score = float(prior(merged, targets).log_likelihood(targets).detach().sum().exp())
            total += score
            best[body] = score
        totals.append(total)
    assert sum(totals) <= 1 + 1e-9
    survivors = [1 - sum(totals[: n + 1]) for n in range(6)]
    assert all(b < a for a, b in itertools.pairwise(survivors))
    assert survivors[-1] < 0.2
    found = one_shot(prior, merged, top_k=7, max_tokens=8)
    first = prior(merged, rows([[0]])).logits[0, 0].argmax()
    assert first in found.tokens[0, :, 0]
    assert found.tokens[0, 0, 0] == first
    for strand, score, finished in zip(found.tokens[0], found.scores[0], found.finished[0], strict=True):
        if finished and 0 < int((strand != SEP).sum()) <= 5 and score > -50:
            body = tuple(strand[strand != SEP].tolist())
            assert math.exp(float(score)) == pytest.approx(best[body], abs=1e-6)


def test_splitting_finds_labels_that_begin_alike() -> None:
    prior = make_prior(prompt=())
    merged = make_merged([4])
    joint = {}
    for body in itertools.product(range(SEP), repeat=2):
        targets = rows([list(body)])
        scores = prior(merged, targets).log_likelihood(targets)[0]
        joint[body] = float(scores[:2].detach().sum())
    found = one_shot(prior, merged, top_k=7, max_tokens=3, branch_tokens=2)
    twos = [tuple(s[:2].tolist()) for s in found.tokens[0] if SEP not in s[:2].tolist()]
    best = sorted(joint, key=joint.__getitem__, reverse=True)
    assert twos == best[: len(twos)]
    assert len({t[0] for t in twos}) < len(twos)
    # scores still are those of the whole strand: the cache followed the split
    for strand, score, finished in zip(found.tokens[0], found.scores[0], found.finished[0], strict=True):
        if finished:
            targets = rows([strand[strand != SEP].tolist()])
            scores = prior(merged, targets).log_likelihood(targets)[0]
            torch.testing.assert_close(score, scores.sum(), atol=1e-5, rtol=0)


def test_strings_are_summed() -> None:
    tokens = torch.tensor([[[1, SEP], [2, SEP], [3, 4], [SEP, SEP], [5, SEP]]])
    scores = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05]]).log()
    finished = torch.tensor([[True, True, False, True, True]])
    names = {1: "cat", 2: " cat ", 5: "dog"}
    labels = scored_labels(Branches(tokens, scores, finished, 2), SEP, lambda ids: names[int(ids[0])])
    assert [label for label, _ in labels[0]] == ["cat", "dog"]
    assert labels[0][0][1] == pytest.approx(0.7)
    kept = scored_labels(Branches(tokens, scores, finished, 2), SEP, lambda ids: names[int(ids[0])], 0.1)
    assert [label for label, _ in kept[0]] == ["cat"]
    branches = Branches(tokens, scores, finished, 2)
    for ratio, expected in ((0.05 / 0.7 - 1e-4, 2), (0.05 / 0.7 + 1e-4, 1)):  # a share of the likeliest label
        kept = scored_labels(branches, SEP, lambda ids: names[int(ids[0])], min_ratio=ratio)
        assert len(kept[0]) == expected


def test_greedy_labels_follow_the_repo_mask() -> None:
    prior = make_prior("repo")
    merged = make_merged([4])
    written = greedy_labels(prior, merged, 8)
    targets = torch.cat([written, torch.full((1, 1), SEP)], dim=1)
    targets = torch.cat([targets, torch.tensor([[1, SEP]])], dim=1)  # so that no label of `written` is last
    assert (prior(merged, targets).logits.argmax(-1)[:, :8] == written).all()
    with pytest.raises(UserError, match="one_shot"):
        greedy_labels(make_prior(), merged, 4)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="top_k=0"):
        one_shot(make_prior(), make_merged([2]), top_k=0)
