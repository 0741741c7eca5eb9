"""What flows through the main path: tokens, their attention statistics, merged tokens.

Legend of shape letters, used in every docstring of the project:

====== ==================================================================
letter meaning
====== ==================================================================
B      samples in a batch
N      tokens of a sample that the backbone gives (padded to the longest)
K      merged tokens of a sample (padded to the largest)
D      width of a token
M      width of what similarity compares
L      chosen backbone layers
P      coordinates of a position: 1 text, 2 image (row, column), 3 video (frame, row, column)
T      target tokens (padded with -100)
V      size of the target vocabulary
====== ==================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of a backbone's own attention, one row per chosen layer.

    Attributes:
        entropy: [L,B,N] float in [0,1]; mean over heads of the row entropy, divided by the log of the
            number of visible keys. High = the token looks everywhere.
        norm: [L,B,N] float >= 0; L2 norm of the concatenated heads' attention output.
        received: [L,B,N] float >= 0; attention that a token receives, averaged over heads and summed over
            queries. ``None`` unless asked for: it costs one more pass and is not causal.
    """

    entropy: Tensor
    norm: Tensor
    received: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """How many tokens a merger is to leave, where a schedule and not the merger's budget decides it.

    Attributes:
        counts: [B] long, protected tokens included.
        most: the largest count, as far as it is known without reading ``counts``.
    """

    counts: Tensor
    most: int


@dataclass(frozen=True)
class Tokens:
    """A batch of backbone tokens.

    Attributes:
        values: [B,N,D] float.
        mask: [B,N] bool, True = real token.
        positions: [B,N,P] long, the tokens' own coordinates.
        attention: statistics of the chosen layers, or ``None`` if the backbone gives none.
        metric: [B,N,M] float, what similarity compares; ``None``: the values.
        protected: [B,N] bool, tokens that every merger keeps unmerged with others (a class token).
        context: the paired text (a question about the picture), for mergers that read it.
        size: [B,N] float >= 0, how many raw tokens each one stands for; ``None``: one each.
        seeds: [B] long, one number per sample that alone decides its random draws, so that noise does not
            depend on the process, the batch or the rank; ``None``: the merger counts its calls.
        ids: [B,N] long, vocabulary ids of a text, for mergers that learn to guess them; ``None``: no text.
        keep: how many tokens to leave; ``None``: as the merger's budget says.
    """

    values: Tensor
    mask: Tensor
    positions: Tensor
    attention: AttentionStats | None = None
    metric: Tensor | None = None
    protected: Tensor | None = None
    context: Tokens | None = None
    size: Tensor | None = None
    seeds: Tensor | None = None
    ids: Tensor | None = None
    keep: Keep | None = None

    @property
    def counts(self) -> Tensor:
        """Valid tokens per sample, [B] long."""
        return self.mask.sum(dim=1)


@dataclass(frozen=True)
class MergedTokens:
    """A shorter sequence, in the order of the original one, and where each token went.

    Attributes:
        values: [B,K,D] float, zero where ``mask`` is False.
        mask: [B,K] bool, True = real merged token; real ones come first.
        size: [B,K] float, how many raw tokens each one stands for; zero where ``mask`` is False.
        positions: [B,K,P] long, coordinates of the anchor (the member that names the group).
        ready: [B,K] long, index of the last input token that the merged token depends on; the number of valid
            tokens for a span of a streaming merger that the text's end left open.
        assignment: [B,N] long in [0,K), -1 = dropped or padding.
        weights: [B,N] float >= 0, share of each token in its group's average before normalisation.
        losses: scalar losses of the merger itself (a ratio loss, say), by name.
        counts: [B] long, valid input tokens per sample; ``None``: those that were not dropped.
        anchors: [B,K] long in [0,N), index of the anchor, for mergers that have one.
        end: [B] long, 1 + the largest coordinate of the input: where what follows it stands, whichever tokens were
            merged; ``None``: that of the merged tokens.
        unmerged: [B,N,D] float, the tokens as the merger found them, for a decoder that predicts each of them;
            streaming mergers give it.
        faint: [B,K] bool, tokens that stay in training alone, next to unseen, for a merger to learn from; they do
            not count as kept. ``None``: none do.
    """

    values: Tensor
    mask: Tensor
    size: Tensor
    positions: Tensor
    ready: Tensor
    assignment: Tensor
    weights: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None
    anchors: Tensor | None = None
    end: Tensor | None = None
    unmerged: Tensor | None = None
    faint: Tensor | None = None

    def unmerge(self) -> Tensor:
        """Give each token its group's value back.

        Returns:
            [B,N,D]; zeros for padding and for dropped tokens.
        """
        kept = self.assignment >= 0
        index = self.assignment.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.values.shape[-1])
        return torch.gather(self.values, 1, index) * kept.unsqueeze(-1).to(self.values.dtype)

    @property
    def compression(self) -> Tensor:
        """Valid tokens in per token out, [B] float."""
        counts = (self.assignment >= 0).sum(dim=1) if self.counts is None else self.counts
        kept = self.mask if self.faint is None else self.mask & ~self.faint
        return counts.float() / kept.sum(dim=1).clamp(min=1).float()
