"""Texts that grow by a token at a time, for generation in streaming mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.priors.ready import ready_before
from qm_lightning.tokens import MergedTokens

if TYPE_CHECKING:
    from qm_lightning.priors.streaming import StreamingPrior

# Merges the tokens read so far: ids [B,N] long and mask [B,N] bool -> their merged tokens.
Encoder = Callable[[Tensor, Tensor], MergedTokens]


class GrowingText:
    """A batch of texts, and what the prior keeps of them: one entry of its cache per merged token.

    Args:
        prior: the prior.
        encode: backbone and merger.
        prompts: [B,N] long, padded at the end.
        mask: [B,N] bool, True = real token.
        room: tokens that may be appended.

    Attributes:
        cache: of the global transformer; slot 0 of each text is the start vector.
    """

    def __init__(
        self, prior: StreamingPrior, encode: Encoder, prompts: Tensor, mask: Tensor, room: int
    ) -> None:
        self.prior, self.encode = prior, encode
        self.lengths = mask.sum(dim=1)
        self.ids = F.pad(prompts.masked_fill(~mask, 0), (0, room))
        self.merged = self._merge()
        ready = self._ready()
        # What is not ready must not stay in the cache as if it were.
        index = torch.arange(self.merged.mask.shape[1], device=mask.device)
        known = replace(self.merged, mask=self.merged.mask & (index < ready[:, None]))
        x, positions, bias = prior.read(known)
        self.cache = prior.trunk.new_cache(x.shape[0], x.shape[1])
        self.states = prior.states(x, positions, bias, self.cache)
        self.cache.advance_some(ready + 1)

    def append(self, token: Tensor) -> None:
        """Read one more token of each text, [B] long."""
        self.ids.scatter_(1, self.lengths.unsqueeze(1), token.unsqueeze(1))
        self.lengths = self.lengths + 1
        self.merged = self._merge()
        ready = self._ready()
        while bool((self.cache.lengths <= ready).any()):
            self._read_next(self.cache.lengths <= ready)

    def logits(self) -> Tensor:
        """Of the token that follows each text, [B,V]."""
        back = torch.arange(self.prior.reach - 1, -1, -1, device=self.ids.device)
        rows = self.lengths[:, None] - back
        previous = self.prior.embed(self.merged, self.ids.gather(1, (rows - 1).clamp(min=0)), rows)
        logits = self.prior.predict(self.states, ready_before(self.merged, rows), previous, rows)
        return logits[:, -1]

    def _merge(self) -> MergedTokens:
        tokens = int(self.lengths.max())
        mask = torch.arange(tokens, device=self.ids.device) < self.lengths[:, None]
        return self.encode(self.ids[:, :tokens], mask)

    def _ready(self) -> Tensor:
        """How many merged tokens of each text are ready, [B] long."""
        return ready_before(self.merged, self.lengths.unsqueeze(1)).squeeze(1)

    def _read_next(self, due: Tensor) -> None:
        """Let the global transformer read the next merged token of the texts that are ``due``, [B] bool."""
        place = self.cache.lengths.clamp(max=self.merged.mask.shape[1]).unsqueeze(1)
        rows = place.unsqueeze(-1)
        # The start vector has no merged token; the last slot has none yet where a text is not due.
        x, positions, bias = self.prior.read(_pick(self.merged, place - 1))
        self.cache.reserve(self.cache.extent + 1)
        state = self.prior.states(x[:, 1:], positions[:, 1:], bias[:, 1:], self.cache)
        self.cache.advance_some(due.long())
        missing = self.cache.extent + 1 - self.states.shape[1]
        self.states = F.pad(self.states, (0, 0, 0, max(0, missing)))
        where = rows.expand_as(state)
        state = torch.where(due[:, None, None], state, self.states.gather(1, where))
        self.states = self.states.scatter(1, where, state)


def _pick(merged: MergedTokens, index: Tensor) -> MergedTokens:
    """The merged tokens at ``index`` [B,R] long, without their provenance."""
    index = index.clamp(min=0)
    values, positions = (
        x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        for x in (merged.values, merged.positions)
    )
    mask, size = merged.mask.gather(1, index), merged.size.gather(1, index)
    return replace(merged, values=values, mask=mask, size=size, positions=positions)
