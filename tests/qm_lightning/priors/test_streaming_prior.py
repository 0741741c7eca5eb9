"""Degenerate cases, refusals and costs of the streaming prior."""

from dataclasses import replace

import pytest
import torch
from prior_cases import from_parts, make_merged
from streaming_cases import IDLE, OPEN, WIDTH, Model, texts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, FixedStride, LearnedRouter, NoMerge, StreamingQuickMerge
from qm_lightning.priors import StreamingPrior, check_streaming, streaming_targets
from qm_lightning.priors.ready import ready_before
from qm_lightning.priors.transformer import CausalTransformer, WindowAttention, key_bias

VOCAB = 5
CLOSE = {"rtol": 0.0, "atol": 1e-11}


def embedded(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What the local decoder reads before each token: the one before it, and the backbone's state of that one."""
    prior, states = model.prior, model.backbone(ids[:, :-1]).values
    assert prior.skip is not None
    return torch.cat([prior.begin.expand(3, 1, -1), prior.embedding(ids[:, :-1]) + prior.skip(states)], dim=1)


@torch.no_grad()
def test_6_without_merging_and_window_it_is_a_plain_autoregressive_model() -> None:
    model = Model("none", VOCAB, window=1)
    prior, ids = model.prior, texts(VOCAB, 3, 9)
    # A plain model: the transformer reads [start ; h_0 ; ... ; h_7], and each row is decoded by itself.
    values = model.backbone(ids).values
    x = torch.cat(
        [prior.start.expand(3, 1, -1), prior.input_projection(prior.input_norm(values[:, :-1]))], dim=1
    )
    place = torch.arange(9)[None, :, None].expand(3, 9, 3)
    hidden = prior.state_projection(prior.trunk(x, place, torch.zeros(3, 9)))
    read = embedded(model, ids) + hidden
    want = torch.stack(
        [
            prior.head(prior.local(read[:, t : t + 1], place[:, t : t + 1], torch.zeros(3, 1)))[:, 0]
            for t in range(9)
        ],
        dim=1,
    )
    torch.testing.assert_close(model.logits(ids), want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", IDLE)
def test_6_a_merger_that_is_to_merge_nothing_is_that_model(name: str) -> None:
    model, ids = Model("none", VOCAB), texts(VOCAB, 3, 9)
    want = model.logits(ids)
    model.merger = IDLE[name](VOCAB).double().eval()
    torch.testing.assert_close(model.logits(ids), want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", OPEN)
def test_6_one_open_span_is_the_local_decoder_with_the_start_vector(name: str) -> None:
    model = Model("none", VOCAB, window=20)
    model.merger = OPEN[name](VOCAB).double().eval()
    prior, ids = model.prior, texts(VOCAB, 3, 9)
    start = prior.state_projection(
        prior.trunk(prior.start.expand(3, 1, -1), torch.zeros(3, 1, 3), torch.zeros(3, 1))
    )
    read = embedded(model, ids) + start
    full = CausalTransformer(16, 2, 2).double()
    full.load_state_dict(prior.local.state_dict())
    want = prior.head(full(read, torch.arange(9)[None, :, None].expand(3, 9, 3), torch.zeros(3, 9)))
    torch.testing.assert_close(model.logits(ids), want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2])
def test_6_text_shorter_than_a_span(length: int) -> None:
    model = Model("stride", VOCAB)
    model.merger = FixedStride(FixedBudget(4.0))
    ids = texts(VOCAB, 2, length)
    longer = torch.cat([ids, texts(VOCAB, 2, 6, seed=1)], dim=1)
    torch.testing.assert_close(model.logits(longer)[:, :length], model.logits(ids), **CLOSE)


def test_6_empty_text_is_refused() -> None:
    model = Model("stride", VOCAB)
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(UserError, match="prompt of a sample is empty"):
        model.prior.generate(model.encode, texts(VOCAB, 2, 2), mask, 3)


@torch.no_grad()
def test_an_end_token_may_follow_the_text() -> None:
    model = Model("quickmerge", VOCAB)
    ids = texts(VOCAB, 3, 9)
    with_end = torch.cat([ids, torch.zeros(3, 1, dtype=torch.long)], dim=1)
    scored = model.prior(model.encode(ids), with_end).logits
    # The same row, seen from a longer text.
    torch.testing.assert_close(scored[:, 9], model.logits(with_end)[:, 9], **CLOSE)


@torch.no_grad()
def test_generation_is_deterministic_and_stops_at_the_end_token() -> None:
    model = Model("router", VOCAB)
    prompts, mask = texts(VOCAB, 4, 5), torch.ones(4, 5, dtype=torch.bool)

    def write(seed: int, eos: int | None = None) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        written: torch.Tensor = model.prior.generate(
            model.encode, prompts, mask, 10, top_p=0.9, eos_id=eos, generator=draw
        )
        return written

    assert torch.equal(write(1), write(1))
    assert not torch.equal(write(1), write(2))
    for row in write(1, eos=2).tolist():
        if 2 in row:
            assert set(row[row.index(2) :]) == {2}


def test_broken_weights_are_refused() -> None:
    model = Model("stride", VOCAB)
    model.prior.head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        model.prior.generate(model.encode, texts(VOCAB, 1, 3), torch.ones(1, 3, dtype=torch.bool), 3)
    with pytest.raises(UserError, match="temperature=-1"):
        model.prior.generate(model.encode, texts(VOCAB, 1, 3), torch.ones(1, 3, dtype=torch.bool), 3, -1)


def test_ready_before_by_hand() -> None:
    merged = make_merged([3, 2])
    merged = replace(merged, ready=torch.tensor([[1, 1, 4], [0, 6, 0]]))
    rows = torch.arange(7).expand(2, 7)
    assert ready_before(merged, rows).tolist() == [[0, 0, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", [1, 2, 5, 8, 30])
def test_window_attention_is_a_band(window: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(16, 2, window).double()
    query, key, value = torch.randn(3, 2, 2, 13, 8, dtype=torch.float64)
    key[..., -1] = 0.0
    distance = torch.arange(13)[:, None] - torch.arange(13)
    seen = (distance >= 0) & (distance < window)
    weights = (query @ key.mT).masked_fill(~seen, float("-inf")).softmax(-1)
    query[..., -1] = 1.0  # as ``rotate`` leaves it: the channel of the bias
    torch.testing.assert_close(attention.attend(query, key, value), weights @ value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read_backbone", [True, False])
@pytest.mark.parametrize(("K", "T", "window"), [(1, 1, 4), (5, 16, 4), (7, 18, 5)])
def test_flops_are_those_of_the_counter(K: int, T: int, window: int, read_backbone: bool) -> None:
    sizes = {"dim": 32, "depth": 2, "heads": 2, "local_dim": 16, "local_heads": 2, "window": window}
    prior = StreamingPrior(12, 7, **sizes, read_backbone=read_backbone).double().to("meta")
    merged = make_merged([K])
    parts = (merged.values, merged.mask, merged.size, merged.positions)
    merged = from_parts(*(part.to("meta") for part in parts))
    merged = replace(merged, unmerged=torch.zeros(1, T, 12, dtype=torch.float64, device="meta"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        prior(merged, torch.zeros(1, T, dtype=torch.long, device="meta"))
    assert prior.flops(K, T) == counter.get_total_flops()


def test_merging_saves_work() -> None:
    prior = StreamingPrior(12, 7, local_dim=32, local_heads=2)
    assert prior.flops(64, 256) < 0.45 * prior.flops(256, 256)


def test_streaming_refuses_what_looks_ahead() -> None:
    for merger in (NoMerge(), FixedStride(), LearnedRouter(), StreamingQuickMerge()):
        check_streaming(type(merger).__name__, merger.causality, causal_backbone=True)
    with pytest.raises(UserError, match=r"TopKPrune of class 'ordered': its budget reads the whole sequence"):
        check_streaming("TopKPrune", "ordered", causal_backbone=True)
    with pytest.raises(UserError, match=r"ToMe of class 'global': its groups join tokens from anywhere"):
        check_streaming("ToMe", "global", causal_backbone=True)
    with pytest.raises(UserError, match="attends in both directions"):
        check_streaming("FixedStride", "streaming", causal_backbone=False)


def test_targets_are_the_text() -> None:
    ids, mask = torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]])
    assert streaming_targets(ids, mask).tolist() == [[3, 4, -100]]
    assert streaming_targets(ids, mask.bool()).tolist() == [[3, 4, -100]]


def test_gradients_reach_every_parameter() -> None:
    model = Model("quickmerge, learned", VOCAB)
    model.prior.requires_grad_(True)
    ids = texts(VOCAB, 4, 12)
    model.prior(model.encode(ids), ids).log_likelihood(ids).sum().backward()
    for name, parameter in [*model.prior.named_parameters(), *model.merger.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_size_and_place_of_merged_tokens_are_read() -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "local_dim": 16, "local_heads": 2}
    prior = StreamingPrior(WIDTH, VOCAB, **sizes, read_backbone=False).double()
    merged = replace(make_merged([6], width=WIDTH), ready=torch.arange(6)[None])
    logits = prior(merged, texts(VOCAB, 1, 9)).logits
    assert not torch.allclose(
        prior(replace(merged, size=merged.size.flip(1)), texts(VOCAB, 1, 9)).logits, logits
    )
    moved = replace(merged, positions=2 * merged.positions)
    assert not torch.allclose(prior(moved, texts(VOCAB, 1, 9)).logits, logits)
    assert key_bias(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).item() == 0.0


@torch.no_grad()
def test_the_local_decoder_reads_the_backbone_unless_told_not_to() -> None:
    model, ids = Model("stride", VOCAB), texts(VOCAB, 3, 9)
    merged = model.encode(ids)
    assert torch.equal(merged.unmerged, model.backbone(ids).values)
    other = replace(merged, unmerged=merged.unmerged.roll(1, dims=-1))
    moved = (model.prior(other, ids).logits - model.prior(merged, ids).logits).abs().amax((0, 2))
    assert moved[0] == 0.0  # nothing stands before the first token
    assert (moved[1:] > 1e-6).all()
    model.prior.skip = None
    assert torch.equal(model.prior(other, ids).logits, model.prior(merged, ids).logits)


def test_a_merger_that_keeps_no_tokens_is_refused() -> None:
    model, ids = Model("stride", VOCAB), texts(VOCAB, 3, 9)
    with pytest.raises(UserError, match=r"MergedTokens.unmerged.*read_backbone false"):
        model.prior(replace(model.encode(ids), unmerged=None), ids)
