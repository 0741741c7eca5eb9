"""A prior that writes labels: all of them are next tokens of one prefix, and none sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.priors.ar_prior import ARPrior, PriorOutput, _Context, _join, _Sequence
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.label_mask import LabelVariant, label_layout, prefix_label_mask
from qm_lightning.priors.rope import AXES
from qm_lightning.tokens import MergedTokens

VARIANTS = ("strict", "repo")


class LabelPrior(ARPrior):
    """An ``ARPrior`` whose targets are labels: [merged tokens ; BOS, prompt ; label, SEP ; label, SEP ; ...].

    Merged tokens see each other in both directions. ``strict``: every label's first token is predicted at the
    anchor (the last prompt token), so training does what one-shot sampling does, and the order of labels has
    no meaning. ``repo``: as the paper's code has it, a label's first token is predicted at the SEP of the
    label before, positions run on, and the last SEP is not learnt (generative.md, section 2).

    Args:
        input_dim: width of merged tokens.
        vocab_size: size of the target vocabulary.
        sep_id: the token that closes a label; ``None``: the last one of the vocabulary.
        variant: ``strict`` or ``repo``.
        prompt: target tokens between BOS and the labels; BOS itself is learnt and may be prompt enough.
        **sizes: ``dim``, ``depth``, ``heads``, ``dropout`` and ``rope_base`` of ``ARPrior``.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        input_dim: int,
        vocab_size: int,
        sep_id: int | None = None,
        variant: LabelVariant = "strict",
        prompt: Sequence[int] = (),
        dim: int = 128,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
    ) -> None:
        # A merged token sees its neighbours here, so predicting them would teach nothing: no alignment.
        super().__init__(input_dim, vocab_size, dim, depth, heads, dropout, align=False, rope_base=rope_base)
        if variant not in VARIANTS:
            raise UserError(f"prior variant={variant!r}; expected strict or repo; choose one")
        self.sep_id = vocab_size - 1 if sep_id is None else sep_id
        if not all(0 <= token < vocab_size for token in (self.sep_id, *prompt)):
            raise UserError(
                f"prior sep_id={self.sep_id}, prompt={list(prompt)}; expected ids under {vocab_size}, the "
                "size of the target vocabulary; mend them"
            )
        self.variant: LabelVariant = variant
        self.register_buffer("prompt", torch.tensor([*prompt], dtype=torch.long), persistent=False)
        self.prompt: Tensor

    @property
    def prompt_tokens(self) -> int:
        """Tokens between merged tokens and labels: BOS and the prompt."""
        return 1 + len(self.prompt)

    def forward(self, merged: MergedTokens, targets: Tensor, align: bool = True) -> PriorOutput:
        """Logits of all label tokens in one packed pass.

        Args:
            merged: the prefix; every sample has at least one valid token.
            targets: [B,T] long, each label's tokens and then SEP; -100 = padding, at the end only.
            align: has no meaning here; there is no alignment.

        Returns:
            Logits [B,T,V]; row t is the distribution that target t was drawn from.
        """
        context = self._read(merged)
        seen = self.learnt(targets)
        layout = label_layout(seen, self.sep_id)
        place = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
        strict = self.variant == "strict"
        labels = self._place(context, seen.clamp(min=0), layout.offset if strict else place)
        mask = prefix_label_mask(
            merged.mask.shape[1], self.prompt_tokens, seen, self.sep_id, self.variant
        ).unsqueeze(1)
        hidden = self.trunk(*_join(self._prefix(context), labels), mask=mask)
        anchor = merged.mask.shape[1] + self.prompt_tokens - 1
        first = (layout.offset if strict else place) == 0
        rows = (anchor + place).masked_fill(first, anchor).unsqueeze(-1)
        return PriorOutput(self.head(hidden.gather(1, rows.expand(-1, -1, hidden.shape[-1]))))

    def learnt(self, targets: Tensor) -> Tensor:
        """The targets that count in the loss, [B,T] long: all, or in ``repo`` all but the last SEP."""
        if self.variant == "strict":
            return targets
        index = torch.arange(targets.shape[1], device=targets.device)
        last = (targets != -100).sum(dim=1, keepdim=True) - 1
        return targets.masked_fill((index == last) & (targets == self.sep_id), -100)

    def read_prefix(self, merged: MergedTokens, room: int) -> tuple[Tensor, KVCache, Tensor]:
        """Read merged tokens and prompt, for decoding.

        Args:
            merged: the prefix.
            room: label tokens that will be read after it.

        Returns:
            Logits at the anchor [B,V]; the cache; the position of a label's first token [B] long.
        """
        context = self._read(merged)
        sequence = self._prefix(context)
        batch, tokens = sequence[2].shape
        none = merged.assignment.new_empty(batch, 0)
        mask = prefix_label_mask(merged.mask.shape[1], self.prompt_tokens, none, self.sep_id)
        cache = self.trunk.new_cache(batch, tokens + room)
        hidden = self.trunk(*sequence, cache, mask.unsqueeze(1))
        cache.advance(tokens)
        return self.head(hidden[:, -1]), cache, context.start + self.prompt_tokens

    def read_labels(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """Read one more token of each of R label strands.

        Args:
            tokens: [B,R] long.
            positions: [B,R] long.
            mask: bool, broadcastable to [B,1,R,cached + R], True = may attend.
            cache: from ``read_prefix``; it is advanced.

        Returns:
            Logits of the tokens that follow, [B,R,V].
        """
        embeddings = self.embedding(tokens)
        bias = embeddings.new_zeros(tokens.shape)
        axes = positions.unsqueeze(-1).expand(-1, -1, AXES)
        hidden = self.trunk(embeddings, axes, bias, cache, mask)
        cache.advance(tokens.shape[1])
        logits: Tensor = self.head(hidden)
        return logits

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: labels are sampled in one shot (``one_shot``), or one by one (``greedy_labels``).

        Raises:
            UserError: always.
        """
        raise UserError(
            "a LabelPrior writes labels, not one text; expected one_shot or greedy_labels; use NXTPModule, or "
            "an ARPrior for texts"
        )

    def _prefix(self, context: _Context) -> _Sequence:
        """[context ; BOS ; prompt]."""
        return self._with_targets(context, self.prompt.expand(context.bias.shape[0], -1))

    def _place(self, context: _Context, tokens: Tensor, offset: Tensor) -> _Sequence:
        """Label tokens [B,T] at ``offset`` [B,T] behind the prompt."""
        positions = context.start[:, None] + self.prompt_tokens + offset
        embeddings = self.embedding(tokens)
        bias = context.bias.new_zeros(tokens.shape)
        return embeddings, positions.unsqueeze(-1).expand(-1, -1, AXES), bias


def keep_first_blocks(state: dict[str, Tensor], prior: nn.Module) -> dict[str, Tensor]:
    """Truncate a prior: its embeddings, first blocks, last norm and head, for a shallower one.

    Args:
        state: state dict of a prior of the same widths and at least as many blocks.
        prior: the shallower prior; not changed. Load the result into it, then fine-tune.

    Returns:
        Exactly the tensors that ``prior`` has.

    Raises:
        UserError: one is missing or has another shape.
    """
    wanted = prior.state_dict()
    for name, tensor in wanted.items():
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(tensor.shape):
            raise UserError(
                f"cannot truncate: {name} is {found or 'missing'} in the deeper prior; expected "
                f"{tuple(tensor.shape)}; give the same prior settings with a smaller depth"
            )
    return {name: state[name] for name in wanted}
