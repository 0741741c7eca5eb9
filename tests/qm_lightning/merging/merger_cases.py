"""Tokens and mergers for the tests of merging."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qm_lightning.merging import (
    SCOPE,
    Budget,
    DynamicViT,
    EViT,
    FixedBudget,
    Merger,
    NoMerge,
    PiToMe,
    QuickMerge,
    RandomPrune,
    ToFu,
    ToMe,
    TopKPrune,
    TrimTokenator,
    UniformPool,
)
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

DIM = 8


@dataclass(frozen=True)
class Case:
    """A merger and what it promises beyond the invariants of all.

    Attributes:
        name: of the test.
        make: budget -> merger.
        keeps_mass: every valid token is in a group, so sizes add up.
        averages: groups are size-weighted means, so first moments are kept.
        plain_values: every output is one of the inputs, untouched.
        budgeted: it takes a budget.
        masks: in training dropped tokens stay in the tensor, next to unseen, so counts hold in evaluation.
    """

    name: str
    make: Callable[[Budget | None], Merger]
    keeps_mass: bool = False
    averages: bool = False
    plain_values: bool = False
    budgeted: bool = True
    masks: bool = False


# A new merger joins the property suite with one line here.
CASES = [
    Case("NoMerge", lambda _: NoMerge(), keeps_mass=True, averages=True, plain_values=True, budgeted=False),
    Case("QuickMerge", lambda b: QuickMerge(b or FixedBudget()), keeps_mass=True),
    Case(
        "QuickMerge-coverage",
        lambda b: QuickMerge(b or FixedBudget(), coverage=0.6, eps=0.3),
        keeps_mass=True,
    ),
    Case("QuickMerge-sharp", lambda b: QuickMerge(b or FixedBudget(), sharpness=1.0), keeps_mass=True),
    Case(
        "QuickMerge-faint",
        lambda b: QuickMerge(
            b or FixedBudget(), learn_weights=True, sharpness=1.0, faint=0.01, input_dim=DIM, layers=2
        ).double(),
        keeps_mass=True,
        masks=True,
    ),
    Case("QuickMerge-mean", lambda b: QuickMerge(b, sharpness=0.0), keeps_mass=True, averages=True),
    Case("QuickMerge-entropy", lambda b: QuickMerge(b), keeps_mass=True),
    Case(
        "QuickMerge-learned",
        lambda b: QuickMerge(b or FixedBudget(), learn_weights=True, input_dim=DIM, layers=2).double(),
        keeps_mass=True,
    ),
    Case("UniformPool", lambda b: UniformPool(b), keeps_mass=True, averages=True),
    Case("RandomPrune", lambda b: RandomPrune(b), plain_values=True),
    Case("TopKPrune", lambda b: TopKPrune(b), plain_values=True),
    Case("TopKPrune-norm", lambda b: TopKPrune(b, by="norm"), plain_values=True),
    Case("TopKPrune-received", lambda b: TopKPrune(b, by="received"), plain_values=True),
    Case("ToMe", lambda b: ToMe(b), keeps_mass=True, averages=True),
    Case("ToMe-rounds", lambda b: ToMe(b, rounds=4), keeps_mass=True, averages=True),
    Case("ToFu-mlerp", lambda b: ToFu(b, mode="mlerp"), keeps_mass=True),
    Case("ToFu-prune", lambda b: ToFu(b, mode="prune"), plain_values=True),
    Case("ToFu-mean", lambda b: ToFu(b, mode="mean"), keeps_mass=True, averages=True),
    Case("PiToMe", lambda b: PiToMe(b), keeps_mass=True, averages=True),
    Case("EViT", lambda b: EViT(b), keeps_mass=True),
    Case("DynamicViT", lambda b: DynamicViT(b, input_dim=DIM).double(), plain_values=True, masks=True),
    Case("SCOPE", lambda b: SCOPE(b), plain_values=True),
    Case("SCOPE-uniform", lambda b: SCOPE(b, by="uniform"), plain_values=True),
    Case("TrimTokenator", lambda b: TrimTokenator(b), plain_values=True),
    Case("TrimTokenator-l1", lambda b: TrimTokenator(b, dist="l1"), plain_values=True),
]


def make_case(case: Case, budget: Budget | None = None) -> Merger:
    """The case's merger, with the same parameters every time."""
    torch.manual_seed(0)
    return case.make(budget)


def make_tokens(
    seed: int = 0,
    samples: int = 3,
    tokens: int = 24,
    axes: int = 1,
    protected: int = 0,
    metric: bool = False,
    text: bool = True,
) -> Tokens:
    """Random float64 tokens; samples after the first are shorter, the last one has the protected tokens and one."""
    random = torch.Generator().manual_seed(seed)
    lengths = [tokens, max(tokens - 5, protected + 1), protected + 1][:samples]
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    index = torch.arange(tokens).expand(samples, tokens)
    grid = {1: [index], 2: [index // 6, index % 6], 3: [index // 12, index // 4 % 3, index % 4]}[axes]

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    words = torch.arange(4) < torch.tensor([4, 2, 0])[:samples, None]
    context = Tokens(randn(samples, 4, DIM), words, torch.arange(4).expand(samples, 4).unsqueeze(-1))
    return Tokens(
        values=randn(samples, tokens, DIM),
        mask=mask,
        positions=torch.stack(grid, -1),
        attention=AttentionStats(*(rand(2, samples, tokens) for _ in range(3))),
        metric=randn(samples, tokens, 4) if metric else None,
        protected=(index < protected) if protected else None,
        context=context if text else None,
        seeds=torch.arange(samples) + 100 * seed,
    )


def cut(tokens: Tokens, rows: slice, columns: slice) -> Tokens:
    """Some samples, some places."""
    stats, text = tokens.attention, tokens.context
    assert stats is not None

    def both(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows, columns]

    return Tokens(
        tokens.values[rows, columns],
        tokens.mask[rows, columns],
        tokens.positions[rows, columns],
        AttentionStats(
            stats.entropy[:, rows, columns],
            stats.norm[:, rows, columns],
            None if stats.received is None else stats.received[:, rows, columns],
        ),
        metric=both(tokens.metric),
        protected=both(tokens.protected),
        context=None if text is None else Tokens(text.values[rows], text.mask[rows], text.positions[rows]),
        size=both(tokens.size),
        seeds=None if tokens.seeds is None else tokens.seeds[rows],
    )


def angles(*degrees: float, protected: int = 0) -> Tokens:
    """One sample of unit vectors in the plane."""
    a = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    values = torch.stack([a.cos(), a.sin()], -1)[None]
    n = len(degrees)
    guard = (torch.arange(n) < protected)[None] if protected else None
    return Tokens(values, torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None, :, None], protected=guard)


def groups(merged: MergedTokens, row: int = 0) -> list[list[int]]:
    """Members of each group, in the order of the groups."""
    a = merged.assignment[row]
    return [(a == k).nonzero().flatten().tolist() for k in range(int(merged.mask[row].sum()))]


class Keep(FixedBudget):
    """Exactly so many tokens."""

    def __init__(self, keep: int) -> None:
        super().__init__(1.0)
        self.keep = keep

    def forward(self, salience: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(1).clamp(max=self.keep)
