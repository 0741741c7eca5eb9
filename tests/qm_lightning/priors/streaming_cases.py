"""A small causal backbone in fp64, streaming mergers over it, and one merger that cheats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from qm_lightning.attention import attention_with_stats
from qm_lightning.merging import (
    DynamicPooling,
    EntropyThreshold,
    FixedBudget,
    FixedStride,
    LearnedRouter,
    NoMerge,
    StreamingQuickMerge,
)
from qm_lightning.merging.base import Merger
from qm_lightning.merging.streaming_base import merge_spans
from qm_lightning.priors import StreamingPrior
from qm_lightning.tokens import MergedTokens, Tokens

WIDTH = 8


class Backbone(nn.Module):
    """Embedding, position, one layer of causal attention with its statistics."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.place = nn.Parameter(0.5 * torch.randn(64, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.double().requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tokens:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        x = self.embedding(ids) + self.place[: ids.shape[1]]
        query, key, value = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out, stats = attention_with_stats(3.0 * query, key, value, is_causal=True)
        index = torch.arange(ids.shape[1]).expand_as(ids)
        values = x + out.transpose(1, 2).flatten(2)
        return Tokens(values, mask, index.unsqueeze(-1), attention=stats, ids=ids)


class TopKSpans(Merger):
    """Closes spans at the tokens of highest salience of the whole sequence, and claims to be streaming."""

    causality = "streaming"

    def forward(self, tokens: Tokens) -> MergedTokens:
        salience = tokens.values[..., 0]
        chosen = salience.topk(max(1, salience.shape[1] // 2), dim=1).indices
        closes = torch.zeros_like(tokens.mask).scatter(1, chosen, True)
        return merge_spans(tokens, closes, torch.ones_like(salience))


class SizedStarts(LearnedRouter):
    """Tells how long a span gets when its first token is read."""

    def forward(self, tokens: Tokens) -> MergedTokens:
        merged = super().forward(tokens)
        slot = merged.assignment.masked_fill(merged.assignment < 0, merged.mask.shape[1])
        members = (
            torch.zeros(len(slot), merged.mask.shape[1] + 1)
            .double()
            .scatter_add(1, slot, tokens.mask.double())
        )
        return replace(merged, size=members[:, :-1])


class EarlyReady(FixedStride):
    """Offers each span one token before its last one is read."""

    def forward(self, tokens: Tokens) -> MergedTokens:
        merged = super().forward(tokens)
        return replace(merged, ready=(merged.ready - 1).clamp(min=0))


def stirred(merger: Merger) -> Merger:
    """With every parameter away from where it starts, and thresholds that both close spans and leave them open."""
    for parameter in merger.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return merger.double().eval()


def threshold_at(merger: Merger, value: float) -> Merger:
    merger.threshold.threshold.fill_(value)
    return merger


MERGERS: dict[str, Callable[[int], Merger]] = {
    "quickmerge": lambda vocab: threshold_at(StreamingQuickMerge(FixedBudget(2.0), max_span=4), 0.15),
    "quickmerge, learned": lambda vocab: threshold_at(
        StreamingQuickMerge(FixedBudget(2.0), learn_weights=True, max_span=4, input_dim=WIDTH), 0.3
    ),
    "stride": lambda vocab: FixedStride(FixedBudget(2.37)),
    "entropy": lambda vocab: threshold_at(
        EntropyThreshold(FixedBudget(2.0), vocab_size=vocab, max_span=4, input_dim=WIDTH), 1.0
    ),
    "entropy, monotone": lambda vocab: EntropyThreshold(
        FixedBudget(2.0), vocab_size=vocab, monotone=True, max_span=4, input_dim=WIDTH
    ),
    "router": lambda vocab: LearnedRouter(FixedBudget(2.0), input_dim=WIDTH),
    "pooling": lambda vocab: DynamicPooling(FixedBudget(2.0), max_span=4, input_dim=WIDTH),
    "none": lambda vocab: NoMerge(),
}
# The same methods, asked to merge nothing.
IDLE: dict[str, Callable[[int], Merger]] = {
    "quickmerge": lambda vocab: StreamingQuickMerge(FixedBudget(1.0)),
    "quickmerge, learned": lambda vocab: StreamingQuickMerge(
        FixedBudget(1.0), learn_weights=True, input_dim=WIDTH
    ),
    "stride": lambda vocab: FixedStride(FixedBudget(1.0)),
    "entropy": lambda vocab: EntropyThreshold(FixedBudget(1.0), vocab_size=vocab, input_dim=WIDTH),
    "entropy, monotone": lambda vocab: EntropyThreshold(
        FixedBudget(1.0), vocab_size=vocab, monotone=True, input_dim=WIDTH
    ),
    "router": lambda vocab: LearnedRouter(FixedBudget(1.0), input_dim=WIDTH),
    "pooling": lambda vocab: DynamicPooling(FixedBudget(1.0), input_dim=WIDTH),
}
# And asked to close no span: with entropies the first token is one, and a router's first token stands for its span.
OPEN: dict[str, Callable[[int], Merger]] = {
    "quickmerge": lambda vocab: threshold_at(StreamingQuickMerge(FixedBudget(2.0), max_span=None), 9.0),
    "quickmerge, learned": lambda vocab: threshold_at(
        StreamingQuickMerge(FixedBudget(2.0), learn_weights=True, max_span=None, input_dim=WIDTH), 1e9
    ),
    "stride": lambda vocab: FixedStride(FixedBudget(100.0)),
    "pooling": lambda vocab: DynamicPooling(FixedBudget(1e9), max_span=None, input_dim=WIDTH),
}
CHEATS: dict[str, Callable[[int], Merger]] = {
    "top-k": lambda vocab: TopKSpans(),
    "size": lambda vocab: SizedStarts(FixedBudget(2.0), input_dim=WIDTH),
    "early": lambda vocab: EarlyReady(FixedBudget(2.0)),
}


class Model(nn.Module):
    """Backbone, merger and prior, as the LightningModule calls them."""

    def __init__(self, name: str, vocab: int, window: int = 3) -> None:
        super().__init__()
        torch.manual_seed(len(name))
        self.vocab = vocab
        self.backbone = Backbone(vocab)
        self.merger = stirred({**MERGERS, **CHEATS}[name](vocab))
        self.prior = StreamingPrior(
            WIDTH, vocab, dim=16, depth=2, heads=2, local_dim=16, local_depth=2, local_heads=2, window=window
        )
        nn.init.normal_(self.prior.head.weight, std=0.5)
        self.double().eval()
        self.prior.requires_grad_(False)

    def encode(self, ids: Tensor, mask: Tensor | None = None, slots: int = 0) -> MergedTokens:
        """Merged tokens, padded to ``slots``: with equal shapes the kernels add up in the same order."""
        merged: MergedTokens = self.merger(self.backbone(ids, mask))
        more = slots - merged.mask.shape[1]
        if more <= 0:
            return merged
        wide = {n: nn.functional.pad(getattr(merged, n), (0, more)) for n in ("mask", "size", "ready")}
        deep = {n: nn.functional.pad(getattr(merged, n), (0, 0, 0, more)) for n in ("values", "positions")}
        return replace(merged, **wide, **deep)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,T,V] for the tokens of the text."""
        targets = ids if mask is None else ids.masked_fill(~mask, -100)
        logits: Tensor = self.prior(self.encode(ids, mask, ids.shape[1]), targets).logits
        return logits

    def log_likelihood(self, ids: Tensor) -> Tensor:
        """[B,T]."""
        likelihood: Tensor = self.prior(self.encode(ids), ids).log_likelihood(ids)
        return likelihood


def texts(vocab: int, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
