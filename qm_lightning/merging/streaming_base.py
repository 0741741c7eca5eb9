"""Mergers of contiguous spans that close while the text is read (spec generative.md, section 6)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import assemble
from qm_lightning.merging.base import Merger
from qm_lightning.merging.budget import Budget, FixedBudget
from qm_lightning.tokens import MergedTokens, Tokens


class StreamingMerger(Merger):
    """A merger whose group k is a function of the tokens up to ``ready_k``, and of nothing else.

    Spans that are open when the text ends become groups too, so that no token is lost, with ``ready`` =
    number of valid tokens: no token of this text comes late enough to read them.

    The number of groups is read on the host: a bound would be all tokens, and a cap that depends on the
    length would look ahead.

    Args:
        budget: its compression is what spans aim at; ``None``: ``FixedBudget()``.
        max_span: longest span in tokens; ``None``: no limit.

    Raises:
        UserError: a budget that counts over the whole sequence, or spans too short for the compression.
    """

    causality = "streaming"

    def __init__(self, budget: Budget | None = None, max_span: int | None = None) -> None:
        super().__init__()
        budget = FixedBudget() if budget is None else budget
        if not isinstance(budget, FixedBudget):
            raise UserError(
                f"{type(self).__name__} with {type(budget).__name__}: that budget reads the whole "
                "sequence, which a streaming merger may not; expected FixedBudget(compression)"
            )
        if max_span is not None and max_span < budget.compression:
            raise UserError(
                f"{type(self).__name__}: max_span={max_span} cannot reach "
                f"compression={budget.compression:g}; expected spans at least as long; raise max_span"
            )
        self.budget = budget
        self.max_span = max_span

    @property
    def compression(self) -> float:
        """Tokens per span that the merger aims at."""
        return self.budget.compression


def cap_spans(ends: Tensor, max_span: int | None) -> Tensor:
    """End a span where it has ``max_span`` tokens.

    Args:
        ends: [B,N] bool, the last token of each span.
        max_span: in tokens.

    Returns:
        [B,N] bool, ``ends`` and those that the limit adds; each a function of ``ends`` up to there.
    """
    if max_span is None:
        return ends
    index = torch.arange(ends.shape[1], device=ends.device)
    latest = torch.where(ends, index, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    return ends | ((index - before) % max_span == 0)


def merge_spans(
    tokens: Tokens,
    closes: Tensor,
    weights: Tensor,
    max_span: int | None = None,
    losses: dict[str, Tensor] | None = None,
) -> MergedTokens:
    """Average spans; each is named by its last token.

    A protected token is a span of its own. That the span before it ends is known when it is seen.

    Args:
        tokens: the input.
        closes: [B,N] bool, the span ends with this token, decided by the tokens up to it.
        weights: [B,N] float > 0 of the average.
        max_span: longest span.
        losses: the merger's own.

    Returns:
        The spans in order.
    """
    index = torch.arange(closes.shape[1], device=closes.device).expand_as(closes)
    ends = closes
    if tokens.protected is not None:
        closes = closes | tokens.protected
        ends = closes | torch.nn.functional.pad(tokens.protected[:, 1:], (0, 1))
    capped = cap_spans(ends, max_span)
    closes = closes | (capped & ~ends)
    ends = (capped | (index == tokens.counts[:, None] - 1)) & tokens.mask
    # One token later: where a protected token follows, or where the text ends.
    known = torch.where(closes, index, index + 1)
    groups = ends.sum(dim=1)
    slots = int(groups.max())
    last = _compact(ends, index, slots)
    assignment = (ends.long().cumsum(dim=1) - ends.long()).masked_fill(~tokens.mask, -1)
    merged = assemble(tokens, assignment, weights, last, groups, whole=False, losses=losses)
    ready = known.gather(1, last).masked_fill(~merged.mask, 0)
    return replace(merged, ready=ready, unmerged=tokens.values)


def _compact(chosen: Tensor, values: Tensor, slots: int) -> Tensor:
    """The values of the chosen tokens, in order, [B,slots]; 0 past the last one."""
    slot = torch.where(chosen, chosen.long().cumsum(dim=1) - 1, slots)
    return values.new_zeros(values.shape[0], slots + 1).scatter(1, slot, values)[:, :-1]


def select_starts(
    tokens: Tokens, starts: Tensor, probability: Tensor, losses: dict[str, Tensor] | None = None
) -> MergedTokens:
    """Let the first token of each span stand for it; it is ready when it is read.

    Its size is its own: how long the span gets is not known when it is read.

    Args:
        tokens: the input.
        starts: [B,N] bool, a span begins with this token, decided by the tokens up to it.
        probability: [B,N] float, of a start; it gets the gradient of the token's weight, which is 1 for the
            first token of a span and 0 for the others (straight-through).
        losses: the merger's own.

    Returns:
        The first tokens of the spans in order; ``assignment`` names each token's span.
    """
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    starts = starts | (index == 0)
    if tokens.protected is not None:
        after = torch.nn.functional.pad(tokens.protected[:, :-1], (1, 0))
        starts = starts | tokens.protected | after
    starts = starts & tokens.mask
    groups = starts.sum(dim=1)
    first = _compact(starts, index, int(groups.max()))
    assignment = (starts.long().cumsum(dim=1) - 1).masked_fill(~tokens.mask, -1)
    weights = starts.to(probability.dtype) + (probability - probability.detach())
    merged = assemble(tokens, assignment, weights, first, groups, whole=False, losses=losses)
    own = torch.ones_like(weights) if tokens.size is None else tokens.size.to(weights.dtype)
    size = own.gather(1, first).masked_fill(~merged.mask, 0.0)
    ready = first.masked_fill(~merged.mask, 0)
    return replace(merged, ready=ready, size=size, unmerged=tokens.values)
