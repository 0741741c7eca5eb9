"""Text from a trained module: prompts of different lengths, merged once or while the text grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qm_lightning.backbones.incremental import growing_encoder
from qm_lightning.errors import UserError
from qm_lightning.priors import StreamingPrior
from qm_lightning.priors.sampling import check_sampling
from qm_lightning.tokens import MergedTokens


class Parts(Protocol):
    """What writes: a ``QuickMergeModule``, a ``StreamingModule``, or a ``WritingParts``."""

    @property
    def backbone(self) -> Any:
        """A frozen ``HFBackbone`` for text."""

    @property
    def merger(self) -> Any:
        """A ``Merger``."""

    @property
    def prior(self) -> Any:
        """An ``ARPrior``, or a ``StreamingPrior``, which merges while it writes."""


@dataclass(frozen=True)
class WritingParts:
    """``Parts`` that belong to no module: those of an export.

    Attributes:
        backbone: an ``HFBackbone``.
        merger: a ``Merger``.
        prior: an ``ARPrior`` or a ``StreamingPrior``.
    """

    backbone: Any
    merger: Any
    prior: Any


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 = greedy.
        top_p: share of the probability that is drawn from.
        seed: of all draws; any that torch takes.

    Raises:
        UserError: settings that cannot be sampled from.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.max_new_tokens)
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}; expected a whole number of 64 bits; choose a smaller one")


@dataclass
class Continuation:
    """What was written after one prompt.

    Attributes:
        ids: token ids so far, without the end token.
        text: their text, without a stop text.
        finished: ``end token``, ``stop text`` or, when the allowance is used up, ``length``; empty before.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: str = ""


@dataclass
class Cost:
    """What a generation took.

    Attributes:
        first_token_s: seconds to the first token; backbone, merger and prior.
        further_s: seconds for all further tokens.
        steps: of the writing; each writes a token after every prompt whose continuation is not finished.
        further: tokens written in all steps but the first, end tokens included.
        tokens: of the texts that the merger read, all prompts together.
        merged: merged tokens made of them.
        cache_bytes: of the prior's keys and values for the merged tokens.
        unmerged_cache_bytes: the same, had nothing been merged.
    """

    first_token_s: float = 0.0
    further_s: float = 0.0
    steps: int = 0
    further: int = 0
    tokens: int = 0
    merged: int = 0
    cache_bytes: int = 0
    unmerged_cache_bytes: int = 0


class Generation:
    """Continues a batch of texts; iterate over it to write.

    Args:
        parts: backbone, merger and prior for text, in evaluation mode.
        prompts: B token id tensors, long [N_i].
        decode: ids, long [T] -> text.
        sampling: how tokens are drawn.
        eos_id: the end token; ``None``: none.
        stop: texts that end a continuation; they are left out of it.

    Attributes:
        rows: one ``Continuation`` per prompt, growing.
        cost: of what was written so far.

    Raises:
        UserError: no prompt, an empty one, or one that does not fit the backbone's positions.
    """

    def __init__(
        self,
        parts: Parts,
        prompts: Sequence[Tensor],
        decode: Callable[[Tensor], str],
        sampling: Sampling,
        eos_id: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.parts, self.decode, self.sampling = parts, decode, sampling
        self.eos_id, self.stop = eos_id, [text for text in stop if text]
        self.rows = [Continuation() for _ in prompts]
        self.cost = Cost()
        check_prompts(parts, prompts, sampling.max_new_tokens)
        device = next(parts.prior.parameters()).device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
        self.mask = torch.arange(self.ids.shape[1], device=device) < lengths[:, None]

    def __iter__(self) -> Iterator[list[Continuation]]:
        """Yields the rows after each step; ends when all are finished."""
        start = time.perf_counter()
        for token in self._tokens():
            self.cost.steps += 1
            if self.cost.steps > 1:
                self.cost.further += sum(not row.finished for row in self.rows)
            for row, i in zip(self.rows, token.tolist(), strict=True):
                self._append(row, i)
            took = time.perf_counter() - start
            if self.cost.steps == 1:
                self.cost.first_token_s = took
            self.cost.further_s = took - self.cost.first_token_s
            yield self.rows
            if all(row.finished for row in self.rows):
                break

    @torch.no_grad()
    def _tokens(self) -> Iterator[Tensor]:
        s, parts, prior = self.sampling, self.parts, self.parts.prior
        generator = torch.Generator(self.ids.device).manual_seed(s.seed)
        draws = (s.max_new_tokens, s.temperature, s.top_p, self.eos_id, generator)
        if isinstance(prior, StreamingPrior):
            encode = growing_encoder(parts.backbone, parts.merger)

            def counted(ids: Tensor, mask: Tensor) -> MergedTokens:
                return self._counted(encode(ids, mask), ids, mask)

            return prior.stream(counted, self.ids, self.mask, *draws)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask.long()}
        merged = self._counted(parts.merger.encode(parts.backbone, inputs), self.ids, self.mask)
        written: Iterator[Tensor] = prior.stream(merged, *draws)
        return written

    def _counted(self, merged: MergedTokens, ids: Tensor, mask: Tensor) -> MergedTokens:
        self.cost.tokens, self.cost.merged = int(mask.sum()), int(merged.mask.sum())
        trunk, width = self.parts.prior.trunk, ids.shape[0]
        self.cost.cache_bytes = trunk.cache_bytes(width, merged.mask.shape[1])
        self.cost.unmerged_cache_bytes = trunk.cache_bytes(width, ids.shape[1])
        return merged

    def settled(self, row: Continuation) -> str:
        """The text that will not change: half-read characters and beginnings of stop texts still may."""
        if row.finished:
            return row.text
        text = row.text.rstrip("\ufffd")
        begun = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _append(self, row: Continuation, token: int) -> None:
        if row.finished:
            return
        if token == self.eos_id:
            row.finished = "end token"
            return
        row.ids.append(token)
        row.text = self.decode(torch.tensor(row.ids))
        found = [row.text.find(text) for text in self.stop if text in row.text]
        if found:
            row.text, row.finished = row.text[: min(found)], "stop text"
        elif len(row.ids) == self.sampling.max_new_tokens:
            row.finished = "length"


def check_prompts(parts: Parts, prompts: Sequence[Tensor], max_new_tokens: int) -> None:
    """Refuse prompts that cannot be continued, before anything is computed.

    Raises:
        UserError: the backbone reads no text, there is no prompt, one is empty, or one is too long.
    """
    if parts.backbone.modality != "text":
        raise UserError(
            f"the run's backbone reads {parts.backbone.modality}; expected one for text; "
            "use `train.py predict` for runs on other data"
        )
    if not prompts:
        raise UserError("found no prompt; expected at least one; give --prompt TEXT or --prompt_file FILE")
    streaming = isinstance(parts.prior, StreamingPrior)
    # The last token that is written is never read.
    written = max_new_tokens - 1 if streaming else 0
    limit = parts.backbone.max_tokens
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty; expected at least one character; give it some text")
        if limit is not None and len(prompt) + written > limit:
            more = f" and {max_new_tokens} new ones" if streaming else ""
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens{more}; expected at most {limit} in all, the positions "
                f"of the backbone {parts.backbone.name_or_path!r}; shorten it"
                + (", or lower --max_new_tokens" if streaming else "")
            )
