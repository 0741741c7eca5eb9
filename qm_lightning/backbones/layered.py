"""The tokens of one forward call on their way through layers between which some of them are removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qm_lightning.backbones.recording import Record
from qm_lightning.errors import UserError
from qm_lightning.merging import Budget, DynamicViT, Schedule
from qm_lightning.merging.assemble import prune
from qm_lightning.merging.base import wanted_counts
from qm_lightning.merging.chain import chain
from qm_lightning.merging.select import width
from qm_lightning.tokens import Keep, MergedTokens, Tokens


@dataclass(frozen=True)
class Layout:
    """Tokens of the first layer.

    Attributes:
        patches: tokens without the special ones.
        tokens: number of special tokens, which come first -> mask [B,S], positions [B,S,P], protected [B,S].
        keeps_special: special tokens are part of the result; otherwise they are dropped at the end.
    """

    patches: int
    tokens: Callable[[int], tuple[Tensor, Tensor, Tensor | None]]
    keeps_special: bool


class Layered:
    """Reduces the hidden states of one forward call, place by place, and says in the end what became of them.

    Args:
        stages: one merger a place.
        schedule: shares the removals out.
        budget: tokens left in the end.
        layout: the tokens of the first layer.
        seeds: [B] long or ``None``, of the noise.
        proportional: add the log of the sizes to the attention scores.
        masks: dropped tokens stay in the tensor (DynamicViT in training).
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        budget: Budget,
        layout: Layout,
        seeds: Tensor | None,
        proportional: bool,
        masks: bool,
    ) -> None:
        self.stages, self.schedule, self.budget = stages, schedule, budget
        self.layout, self.seeds, self.proportional, self.masks = layout, seeds, proportional, masks
        self.special = 0
        self.start: Tokens | None = None
        self.kept: list[Keep] = []
        self.whole: MergedTokens | None = None
        self.policy: Tensor | None = None
        self.policies: list[Tensor] = []
        self.losses: list[Tensor] = []

    def reduce(self, place: int, hidden: Tensor, record: Record, layer: int) -> Tensor:
        """What the next layer gets.

        Args:
            place: number of the place.
            hidden: [B,S,D], what it would have got.
            record: of the call; its steering is changed for the layers that follow.
            layer: the layer before, whose keys and statistics are read.

        Returns:
            [B,S',D].
        """
        tokens = self._tokens(hidden, record, layer)
        if not self.kept:
            self._plan(tokens)
        tokens = replace(tokens, keep=self.kept[place])
        merger = self.stages[place]
        if self.masks and isinstance(merger, DynamicViT):
            before = tokens.mask.to(torch.float32) if self.policy is None else self.policy
            self.policy, loss = merger.decide(tokens, before)
            self.policies.append(self.policy.detach())
            self.losses.append(loss)
            self._steer(record, tokens.mask, None)
            record.steering.policy = self.policy
            return hidden
        merged: MergedTokens = merger(tokens)
        self.whole = merged if self.whole is None else chain(self.whole, merged)
        self._steer(record, merged.mask, merged.size)
        return merged.values

    def finish(self, values: Tensor, teacher: Tensor | None, distill: float) -> MergedTokens:
        """The result of the call.

        Args:
            values: [B,S,D], the model's last hidden state.
            teacher: [B,N,D], that of the plain model.
            distill: weight of the loss by that name.

        Returns:
            Merged tokens of the N input tokens.
        """
        if self.start is None:
            raise UserError(
                "InBackbone saw no layer run; expected a model whose layers are called as modules"
            )
        if self.policy is not None:
            return self._without_special(
                self._masked_result(self.start, self.policy, values, teacher, distill)
            )
        if self.whole is None:
            raise UserError("InBackbone removed nothing; expected at least one place in its schedule")
        whole = self.whole
        last = self.start.counts[:, None].expand_as(whole.ready) - 1  # attention has mixed all tokens
        merged = replace(
            whole,
            values=values.masked_fill(~whole.mask.unsqueeze(-1), 0.0),
            ready=last.masked_fill(~whole.mask, 0),
        )
        return self._without_special(merged)

    def _tokens(self, hidden: Tensor, record: Record, layer: int) -> Tokens:
        """The hidden states with all that a merger may read."""
        if self.start is None:
            self.special = hidden.shape[1] - self.layout.patches
            mask, positions, protected = self.layout.tokens(self.special)
            if mask.shape[1] != hidden.shape[1]:
                raise UserError(
                    f"InBackbone found {hidden.shape[1]} hidden states for {mask.shape[1]} tokens; expected "
                    "one each; use the merger behind this backbone instead"
                )
            self.start = Tokens(hidden, mask, positions, protected=protected, seeds=self.seeds)
        stats = record.stats.get(layer)
        tokens = replace(self.start, values=hidden, attention=stats, metric=record.keys.get(layer))
        done = self.whole
        if done is None:
            return tokens
        protected = self.start.protected
        if protected is not None:
            protected = protected.gather(1, anchors_of(done)) & done.mask
        return replace(tokens, mask=done.mask, positions=done.positions, protected=protected, size=done.size)

    def _plan(self, tokens: Tokens) -> None:
        """How many tokens are left after each place, counted as behind the backbone: special ones apart."""
        special = torch.arange(tokens.mask.shape[1], device=tokens.mask.device) < self.special
        counted = tokens
        if not self.layout.keeps_special:
            counted = replace(tokens, mask=tokens.mask & ~special, protected=None)
        extra = tokens.counts - counted.counts
        final = wanted_counts(self.budget, counted)
        left = self.schedule.kept(counted.counts, final, len(self.stages)) + extra
        # The longest sample there can be keeps most: a bound that needs no look at the data.
        N = tokens.mask.shape[1] - (0 if self.layout.keeps_special else self.special)
        ends = torch.tensor([min(N, max(1, self.budget.bound(N)))])
        most = self.schedule.kept(torch.tensor([N]), ends, len(self.stages)) + tokens.mask.shape[1] - N
        self.kept = [
            Keep(counts, width(counts, int(bound)))
            for counts, bound in zip(left, most[:, 0].tolist(), strict=True)
        ]

    def _steer(self, record: Record, mask: Tensor, size: Tensor | None) -> None:
        bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        if size is not None and self.proportional:
            bias = size.detach().float().clamp(min=1e-6).log()
        record.steering.mask = mask
        record.steering.bias = bias.masked_fill(~mask, -float("inf"))[:, None, None, :]

    def _masked_result(
        self, start: Tokens, policy: Tensor, values: Tensor, teacher: Tensor | None, distill: float
    ) -> MergedTokens:
        """Kept tokens leave; their gates scale values and sizes, as behind the backbone."""
        chosen = (policy > 0) & start.mask
        slope = policy - policy.detach()
        gated = replace(start, values=values * (1.0 + slope).unsqueeze(-1).to(values.dtype))
        merged = prune(gated, chosen, width(chosen.sum(1), start.mask.shape[1]))
        passed = slope.gather(1, anchors_of(merged))
        losses = {"ratio": torch.stack(self.losses).mean()}
        if teacher is not None and distill > 0:
            skip = 0 if teacher.shape[1] == values.shape[1] else self.special
            error = (values[:, skip:] - teacher).square().mean(-1)
            share = (chosen & start.mask)[:, skip:].to(error.dtype)
            losses["distill"] = distill * (error * share).sum() / share.sum().clamp(min=1.0)
        return replace(merged, size=merged.size * (1.0 + passed), losses=losses)

    def _without_special(self, merged: MergedTokens) -> MergedTokens:
        """Drop the special tokens, which stand first and alone, from both ends of the assignment."""
        s = self.special
        if self.layout.keeps_special or s == 0:
            return merged
        assignment = merged.assignment[:, s:]
        mask = merged.mask[:, s:]
        return replace(
            merged,
            values=merged.values[:, s:],
            mask=mask,
            size=merged.size[:, s:],
            positions=merged.positions[:, s:],
            ready=(merged.ready[:, s:] - s).masked_fill(~mask, 0),
            assignment=torch.where(assignment >= 0, assignment - s, -1),
            weights=merged.weights[:, s:],
            counts=None if merged.counts is None else merged.counts - s,
            anchors=(anchors_of(merged)[:, s:] - s).masked_fill(~mask, 0),
        )


def anchors_of(merged: MergedTokens) -> Tensor:
    """The anchors, [B,K] long.

    Raises:
        UserError: the merger names none, so nobody knows where its tokens stand.
    """
    if merged.anchors is None:
        raise UserError(
            "InBackbone needs to know where merged tokens stand and its merger names no anchors; "
            "expected MergedTokens.anchors; use a merger of this project, or fill them in"
        )
    return merged.anchors
