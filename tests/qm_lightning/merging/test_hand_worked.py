"""The hand-worked cases of the specs: what each published method does to a few tokens of known numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from merger_cases import Keep, angles, groups
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging import (
    SCOPE,
    DynamicViT,
    EViT,
    FixedBudget,
    PiToMe,
    QuickMerge,
    ToFu,
    ToMe,
    TopKPrune,
    TrimTokenator,
)
from qm_lightning.merging.bipartite import Lanes, even_with_odd, match
from qm_lightning.merging.dynamic_vit import LEAK
from qm_lightning.merging.pitome import energy
from qm_lightning.merging.scope import pick_order
from qm_lightning.merging.trim_tokenator import most_diverse
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens


def points(*rows: tuple[float, ...], text: tuple[float, ...] | None = None) -> Tokens:
    """One sample of given vectors, and a text of one token."""
    values = torch.tensor([rows], dtype=torch.float64)
    n = len(rows)
    context = None
    if text is not None:
        context = Tokens(
            torch.tensor([[text]], dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.bool),
            torch.zeros(1, 1, 1, dtype=torch.long),
        )
    return Tokens(values, torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None, :, None], context=context)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def kept(merged: MergedTokens) -> list[int]:
    """Indices of the tokens that a pruning method kept."""
    return (merged.assignment[0] >= 0).nonzero().flatten().tolist()


def picks(order: Tensor) -> list[int]:
    """Tokens in the order in which they were picked."""
    chosen = [(int(step), i) for i, step in enumerate(order[0]) if step < order.shape[1]]
    return [i for _, i in sorted(chosen)]


class TestToMe:
    @pytest.mark.parametrize(
        ("degrees", "keep", "want"),
        [
            ((0, 20, 100, 110), 3, [[0], [1], [2, 3]]),
            ((0, 20, 100, 110), 2, [[0, 1], [2, 3]]),
            ((0, 90, 95, 1), 3, [[1], [2], [0, 3]]),
            ((0, 90, 95, 80), 3, [[0], [1, 2], [3]]),
            ((0, 1, 2.5, 90), 2, [[0, 1, 2], [3]]),
            ((0, 3, 90, 91, 180), 3, [[0, 1], [2, 3], [4]]),
        ],
    )
    def test_groups(self, degrees: tuple[float, ...], keep: int, want: list[list[int]]) -> None:
        assert groups(ToMe(Keep(keep))(angles(*degrees))) == want

    def test_one_matching_removes_at_most_half(self) -> None:
        """Of four tokens r = 5 removes two; a further matching is needed for more."""
        tokens = angles(0, 20, 100, 110)
        removed = []

        def pairing(lanes: Lanes, remove: Tensor) -> Tensor:
            removed.append(int(remove))
            return even_with_odd(lanes, remove)

        match(tokens, torch.tensor([1]), FixedBudget(4.0), pairing=pairing)
        assert removed == [2, 1]

    def test_the_class_token_stays_alone_though_it_has_a_twin(self) -> None:
        merged = ToMe(Keep(2))(angles(0, 0, 90, 91, protected=1))
        assert groups(merged)[0] == [0]
        assert groups(ToMe(Keep(3))(angles(0, 0, 90, 91, protected=1))) == [[0], [1], [2, 3]]

    def test_the_future_decides_the_first_tokens_group(self) -> None:
        """The negative control of the prefix test."""
        early = [group for group in groups(ToMe(Keep(3))(angles(0, 90, 95, 1))) if 0 in group]
        late = [group for group in groups(ToMe(Keep(3))(angles(0, 90, 95, 80))) if 0 in group]
        assert early == [[0, 3]]
        assert late == [[0]]


class TestToFu:
    @pytest.mark.parametrize(
        ("pair", "want"),
        [
            (((3.0, 0.0), (0.0, 4.0)), (2.4, 3.2)),
            (((1.0, 0.0), (0.0, 1.0)), (math.sqrt(0.5), math.sqrt(0.5))),
            (((2.0, 1.0), (2.0, 1.0)), (2.0, 1.0)),
            (((1.0, 0.0), (-1.0, 0.0)), (1.0, 0.0)),
        ],
    )
    def test_mlerp(self, pair: tuple[tuple[float, ...], ...], want: tuple[float, float]) -> None:
        merged = ToFu(Keep(1), mode="mlerp")(points(*pair))
        torch.testing.assert_close(merged.values[0, 0], torch.tensor(want, dtype=torch.float64))

    def test_averaging_shrinks_mlerp_does_not(self) -> None:
        tokens = angles(0, 60)
        mean = ToFu(Keep(1), mode="mean")(tokens).values[0, 0]
        assert mean.norm().item() == pytest.approx(math.cos(math.radians(30)))
        assert ToFu(Keep(1), mode="mlerp")(tokens).values[0, 0].norm().item() == pytest.approx(1.0)

    def test_mlerp_has_the_largest_norm_of_each_group(self) -> None:
        random = torch.Generator().manual_seed(0)
        values = torch.randn(1, 20, 5, generator=random, dtype=torch.float64)
        tokens = Tokens(values, torch.ones(1, 20, dtype=torch.bool), torch.arange(20)[None, :, None])
        merged = ToFu(Keep(7), mode="mlerp")(tokens)
        for k, members in enumerate(groups(merged)):
            want = values[0, members].norm(dim=-1).max().item()
            assert merged.values[0, k].norm().item() == pytest.approx(want)

    def test_prune_keeps_the_destination_as_it_is(self) -> None:
        tokens = angles(0, 20, 100, 110)
        merged = ToFu(Keep(3), mode="prune")(tokens)
        assert kept(merged) == [0, 1, 3]
        assert torch.equal(merged.values[0], tokens.values[0, [0, 1, 3]])
        assert merged.size.tolist() == [[1, 1, 1]]


class TestDynamicViT:
    def test_keeps_the_highest_log_odds_in_order(self) -> None:
        merger = DynamicViT(Keep(2), input_dim=4).double().eval()
        tokens = points((1.0, 0, 0, 0), (0.0, 1, 0, 0), (0.0, 0, 1, 0), (0.0, 0, 0, 1))
        assert merger.predictor is not None
        scores = merger.predictor(tokens.values, tokens.mask)[0]
        assert kept(merger(tokens)) == sorted(scores.topk(2).indices.tolist())

    def test_the_global_half_is_the_mean_over_what_is_there(self) -> None:
        torch.manual_seed(0)
        merger = DynamicViT(input_dim=4).double()
        assert merger.predictor is not None
        values = torch.randn(1, 5, 4, dtype=torch.float64)
        policy = row(1, 1, 0, 1, 0)
        everywhere = torch.ones(1, 5, dtype=torch.bool)
        got = merger.predictor(values, everywhere, policy)
        alone = merger.predictor(values[:, policy[0] > 0], everywhere[:, :3])
        torch.testing.assert_close(got[:, policy[0] > 0], alone)

    @pytest.mark.parametrize(("share", "want"), [(0.5, 0.0625), (1.0, (0.25**2 + 0.75**2) / 2)])
    def test_ratio_loss_is_per_sample(self, share: float, want: float) -> None:
        gates = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
        wanted = torch.full((2,), int(4 * share))
        free = torch.ones(2, 4, dtype=torch.bool)
        assert DynamicViT(ratio_weight=1.0)._ratio_loss(gates, free, wanted).item() == pytest.approx(want)

    def test_training_hides_dropped_tokens_and_evaluation_removes_them(self) -> None:
        """What is dropped weighs next to nothing, so a reader by size sees the mean of what is kept."""
        torch.manual_seed(0)
        merger = DynamicViT(Keep(2), input_dim=4).double()
        tokens = Tokens(
            torch.randn(2, 5, 4).double(),
            torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
            torch.arange(5).expand(2, 5)[..., None],
            protected=torch.tensor([[True] + [False] * 4] * 2),
        )
        merged = merger.train()(tokens)
        assert torch.equal(merged.mask, tokens.mask)
        assert torch.equal(merged.values[tokens.mask], tokens.values[tokens.mask])
        assert merged.size[:, 0].tolist() == [1, 1]  # protected
        assert set(merged.size[tokens.mask].tolist()) == {LEAK, 1.0}
        assert not merged.size[~tokens.mask].any()
        weights = merged.size / merged.size.sum(1, keepdim=True)
        kept = (merged.size == 1).double()
        seen, alone = (
            (w[..., None] * tokens.values).sum(1) for w in (weights, kept / kept.sum(1, keepdim=True))
        )
        torch.testing.assert_close(seen, alone, rtol=0, atol=1e-3)
        assert merger.eval()(tokens).mask.sum(1).tolist() == [2, 2]

    def test_what_a_dropped_token_would_bring_reaches_its_logit(self) -> None:
        """A reader that attends by size: the gradient is that of the published mask, d exp(0) / sum exp(0) gate."""
        torch.manual_seed(0)
        merger = DynamicViT(Keep(2), input_dim=4, ratio_weight=0.0).double().train()
        tokens = points((0.0, 0, 0, 1), (0.0, 0, 1, 0), (0.0, 1, 0, 0), (5.0, 0, 0, 0))
        assert merger.predictor is not None
        scores: list[Tensor] = []
        merger.predictor.register_forward_hook(lambda *a: (a[-1].retain_grad(), scores.append(a[-1]))[0])
        for _ in range(
            16
        ):  # until the last token, the only one with something in the first channel, is dropped
            merged = merger(tokens)
            if merged.size[0, 3] == LEAK and merged.size[0].sum() > 1:
                break
        total = merged.size[0].sum()
        loss = -((merged.size[0] * tokens.values[0, :, 0]).sum() / total)
        loss.backward()
        slope = scores[-1].grad
        assert slope is not None
        assert slope[0, 3] < 0  # seeing it would lower the loss ...
        assert (slope[0, :3] >= 0).all()  # ... and seeing more of the others would not

    def test_a_dropped_tokens_logit_gets_a_gradient(self) -> None:
        torch.manual_seed(0)
        merger = DynamicViT(Keep(2), input_dim=4).train()
        tokens = Tokens(
            torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None, :, None]
        )
        assert merger.predictor is not None
        scores: list[Tensor] = []
        merger.predictor.register_forward_hook(lambda *a: (a[-1].retain_grad(), scores.append(a[-1]))[0])
        # A draw in which as many gates are open as wanted has no loss and no gradient, so look at several.
        for _ in range(32):
            merged = merger(tokens)
            dropped = (merged.size[0] == LEAK).nonzero().flatten()
            if merged.losses["ratio"] > 0 and len(dropped):
                break
        merged.losses["ratio"].backward()
        assert scores[-1].grad is not None
        assert (scores[-1].grad[0, dropped] != 0).all()


class TestSCOPE:
    def test_duplicates_gain_nothing(self) -> None:
        tokens, salience = angles(0, 0, 0, 90), row(0.4, 0.3, 0.2, 0.1)
        assert kept(SCOPE(Keep(2)).merge(tokens, salience)) == [0, 3]
        assert salience.topk(2).indices.tolist() == [[0, 1]]

    def test_between_two_near_twins(self) -> None:
        tokens, salience = angles(0, 5, 60, 90, 130), row(0.4, 0.3, 0.15, 0.1, 0.05)
        assert kept(SCOPE(Keep(3)).merge(tokens, salience)) == [0, 2, 3]

    def test_first_pick_without_salience(self) -> None:
        tokens = angles(0, 10, 80, 90, 45)
        similarity = tokens.values[0] @ tokens.values[0].T
        assert similarity.clamp(min=0).sum(0).max().item() == pytest.approx(4.0525, abs=1e-4)
        assert picks(pick_order(tokens.values, torch.ones(1, 5), tokens.mask, 1)) == [4]

    def test_when_nothing_is_left_to_gain_salience_decides_then_the_index(self) -> None:
        tokens = angles(0, 0, 0, 0)
        assert picks(pick_order(tokens.values, row(0.1, 0.4, 0.2, 0.2), tokens.mask, 4)) == [1, 2, 3, 0]

    def test_lazy_picks_what_naive_picks(self) -> None:
        for seed in range(30):
            random = torch.Generator().manual_seed(seed)
            values = torch.randn(1, 14, 4, generator=random, dtype=torch.float64)
            unit = values / values.norm(dim=-1, keepdim=True)
            salience = torch.rand(1, 14, generator=random, dtype=torch.float64)
            mask = torch.ones(1, 14, dtype=torch.bool)
            assert picks(pick_order(unit, salience, mask, 9)) == naive_scope(unit[0], salience[0], 9)

    def test_picks_are_a_prefix(self) -> None:
        tokens, salience = angles(0, 5, 60, 90, 130), row(0.4, 0.3, 0.15, 0.1, 0.05)
        two, three = (picks(pick_order(tokens.values, salience, tokens.mask, k)) for k in (2, 3))
        assert three[:2] == two

    def test_coverage_is_near_the_best(self) -> None:
        for seed in range(10):
            random = torch.Generator().manual_seed(seed)
            values = torch.randn(9, 3, generator=random, dtype=torch.float64)
            unit = values / values.norm(dim=-1, keepdim=True)
            similarity = (unit @ unit.T).clamp(min=0)
            chosen = picks(pick_order(unit[None], torch.ones(1, 9), torch.ones(1, 9, dtype=torch.bool), 3))
            best = max(similarity[:, list(c)].amax(1).sum() for c in itertools.combinations(range(9), 3))
            assert similarity[:, chosen].amax(1).sum() >= (1 - 1 / math.e) * best


def naive_scope(unit: Tensor, salience: Tensor, keep: int) -> list[int]:
    """The method as it is written down, one pick a pass."""
    similarity = unit @ unit.T
    cover = torch.zeros(len(unit), dtype=unit.dtype)
    chosen: list[int] = []
    for _ in range(keep):
        gain = (similarity - cover[:, None]).clamp(min=0).sum(0)
        score = (gain * salience).tolist()
        open_ = [j for j in range(len(unit)) if j not in chosen]
        best = max(open_, key=lambda j: (score[j], float(salience[j]), -j))
        chosen.append(best)
        cover = cover.maximum(similarity[:, best])
    return chosen


class TestTrimTokenator:
    def test_the_distance_decides(self) -> None:
        tokens = points((1.2, 1.2), (0.0, 2.0), text=(0.0, 0.0))
        assert kept(TrimTokenator(Keep(1), dist="l2sq")(tokens)) == [0]
        assert kept(TrimTokenator(Keep(1), dist="l2")(tokens)) == [0]
        assert kept(TrimTokenator(Keep(1), dist="l1")(tokens)) == [1]

    def test_l2sq_needs_the_texts_centre_only(self) -> None:
        random = torch.Generator().manual_seed(0)
        x, t = torch.randn(1, 30, 6, generator=random), torch.randn(1, 5, 6, generator=random)
        every = torch.cdist(x, t).square().mean(-1)
        centre = (x - t.mean(1, keepdim=True)).square().sum(-1)
        assert torch.equal(every.argsort(), centre.argsort())

    def test_the_most_diverse(self) -> None:
        tokens = angles(0, 20, 90, 170, 100)
        means = (tokens.values[0] @ tokens.values[0].T).mean(1)
        want = [0.156, 0.318, 0.500, -0.067, 0.465]
        torch.testing.assert_close(means, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-3)
        assert picks(most_diverse(tokens.values, tokens.mask, 3)) == [3, 0, 1]
        assert picks(most_diverse(tokens.values, tokens.mask, 2)) == [3, 0]
        assert kept(TrimTokenator(Keep(3))(tokens)) == [0, 1, 3]  # no text: the first stage is skipped

    def test_near_the_origin_small_norms_win_unless_normalized(self) -> None:
        tokens = points((0.1, 0.0), (0.0, 3.0), text=(0.0, 1e-3))
        assert kept(TrimTokenator(Keep(1))(tokens)) == [0]
        assert kept(TrimTokenator(Keep(1), normalize=True)(tokens)) == [1]

    def test_a_copy_is_not_excluded(self) -> None:
        """Mean similarity to 0 and 180 degrees is 0 in every direction, also for a copy."""
        tokens = angles(0, 180, 0)
        order = most_diverse(tokens.values, tokens.mask, 3)
        assert sorted(picks(order)) == [0, 1, 2]

    def test_text_that_is_required(self) -> None:
        with pytest.raises(UserError, match="samples without text"):
            TrimTokenator(Keep(1), require_text=True)(points((1.0, 0.0), (0.0, 1.0)))

    def test_text_of_another_width(self) -> None:
        with pytest.raises(UserError, match="width 2 with a text of width 3"):
            TrimTokenator(Keep(1))(points((1.0, 0.0), (0.0, 1.0), text=(0.0, 0.0, 0.0)))


class TestEViT:
    def test_the_fused_token_is_a_sum(self) -> None:
        tokens = points((1.0,), (2.0,), (3.0,), (4.0,))
        merged = EViT(Keep(3)).merge(tokens, row(0.1, 0.4, 0.2, 0.3))
        assert groups(merged) == [[1], [0, 2], [3]]
        torch.testing.assert_close(merged.values[0, :, 0], torch.tensor([2.0, 0.7, 4.0], dtype=torch.float64))
        assert merged.size.tolist() == [[1, 2, 1]]

    def test_without_received_attention(self) -> None:
        tokens = angles(0, 20, 100, 110)
        with pytest.raises(UserError, match="attention statistics"):
            EViT(Keep(2))(tokens)
        stats = AttentionStats(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
        with pytest.raises(UserError, match="received=True"):
            EViT(Keep(2))(replace(tokens, attention=stats))


class TestPiToMe:
    def test_energy(self) -> None:
        tokens = angles(0, 2, 4, 90, 200)
        got = energy(tokens.values, tokens.mask, 0.5)[0]
        want = torch.tensor([0.068, 0.072, 0.076, -0.237, -0.473], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)

    def test_crowded_tokens_merge_others_stay(self) -> None:
        assert groups(PiToMe(Keep(4))(angles(0, 2, 4, 90, 200))) == [[0], [1, 2], [3], [4]]

    def test_counts_are_rounded_not_cut(self) -> None:
        """N = 25 at a ratio of .56: floor(25 - 25 * .56) is 10 in floating point, not 11."""
        random = torch.Generator().manual_seed(0)
        tokens = Tokens(
            torch.randn(1, 25, 4, generator=random),
            torch.ones(1, 25, dtype=torch.bool),
            torch.arange(25)[None, :, None],
        )
        assert int(PiToMe(FixedBudget(25 / 11))(tokens).mask.sum()) == 11


def test_quickmerge() -> None:
    tokens = angles(0, 5, 90, 95)
    merged = QuickMerge(Keep(2), locality=0.0).eval().merge(tokens, row(0.9, 0.1, 0.8, 0.1))
    assert groups(merged) == [[0, 1], [2, 3]]
    x = tokens.values[0]
    torch.testing.assert_close(merged.values[0, 0], (0.9 * x[0] + 0.01 * x[1]) / 0.91)
    assert merged.ready.tolist() == [[1, 3]]


def test_top_k_keeps_by_its_score_alone() -> None:
    tokens = points((1.0, 0.0), (0.0, 3.0), (2.0, 0.0), (0.5, 0.5))
    assert kept(TopKPrune(Keep(2), by="norm")(tokens)) == [1, 2]
