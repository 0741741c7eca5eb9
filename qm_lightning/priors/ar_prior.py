"""The AR prior in conditioning mode: [merged context ; BOS ; target tokens], read by one causal transformer.

Only the context is merged, so the likelihood of the target tokens is exact with any merger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qm_lightning.described import Described
from qm_lightning.errors import UserError
from qm_lightning.priors.rope import AXES, to_three_axes
from qm_lightning.priors.sampling import check_sampling, finite, next_token
from qm_lightning.priors.transformer import CausalTransformer, key_bias
from qm_lightning.tokens import MergedTokens


@dataclass(frozen=True)
class PriorOutput:
    """What a prior says about a batch.

    Attributes:
        logits: [B,T,V] of target token t given the merged tokens and the targets before t.
        forward_prediction: [B,K,input_dim]; row k predicts merged token k + 1 from tokens <= k (the last row
            of a sample predicts nothing); ``None`` without alignment.
        backward_prediction: [B,K,input_dim]; row k predicts merged token k - 1 from tokens >= k (row 0
            predicts nothing); ``None`` without alignment.
    """

    logits: Tensor
    forward_prediction: Tensor | None = None
    backward_prediction: Tensor | None = None

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Log-probability of each target token, in nats.

        Args:
            targets: [B,T] long, -100 = padding.

        Returns:
            [B,T] float <= 0, zero for padding; in fp32 at least.
        """
        logits = self.logits if self.logits.dtype.itemsize >= 4 else self.logits.float()
        chosen = logits.log_softmax(dim=-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(targets == -100, 0.0)


@dataclass(frozen=True)
class _Context:
    """Merged tokens as the trunk reads them: [B,K,dim], [B,K,3], [B,K]; and the first target's place [B]."""

    embeddings: Tensor
    positions: Tensor
    bias: Tensor
    start: Tensor


_Sequence = tuple[Tensor, Tensor, Tensor]  # embeddings [B,S,dim], positions [B,S,3], bias [B,S]


def _join(first: _Sequence, second: _Sequence) -> _Sequence:
    return (
        torch.cat([first[0], second[0]], dim=1),
        torch.cat([first[1], second[1]], dim=1),
        torch.cat([first[2], second[2]], dim=1),
    )


class ARPrior(Described, nn.Module):
    """A causal transformer over merged tokens and the target tokens that follow them.

    Merged tokens keep their own coordinates (three rotary axes, see ``rope``), so one prior takes text,
    images and video. Target token t sits at ``1 + largest coordinate + t`` on all axes, the largest of the input,
    not of its anchors: these differ from sample to sample, and a target would never know how far away row 0 is.
    Attention is proportional: a merged token weighs as many tokens as it stands for. Appending padded merged
    tokens, padded targets or other samples changes nothing.

    Args:
        input_dim: width of merged tokens.
        vocab_size: size of the target vocabulary.
        dim: width of the transformer.
        depth: its blocks.
        heads: its attention heads.
        dropout: of residual branches; call ``eval()`` before generating.
        align: learn to predict the next and the previous merged token as well (quickmerge.md, section 5).
        rope_base: longest wavelength over 2 pi, in positions.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        input_dim: int,
        vocab_size: int,
        dim: int = 128,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        align: bool = True,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if input_dim < 1 or vocab_size < 1:
            raise UserError(
                f"prior input_dim={input_dim}, vocab_size={vocab_size}; expected both to be at least 1; take "
                "them from the backbone (hidden_size) and the data (vocab_size)"
            )
        self.input_dim, self.vocab_size = input_dim, vocab_size
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_projection = nn.Linear(input_dim, dim)
        self.begin = nn.Parameter(torch.randn(dim) * 0.5)
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.trunk = CausalTransformer(dim, depth, heads, dropout, rope_base)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.forward_head = nn.Linear(dim, input_dim) if align else None
        self.backward_head = nn.Linear(dim, input_dim) if align else None

    def forward(self, merged: MergedTokens, targets: Tensor, align: bool = True) -> PriorOutput:
        """Logits of the target tokens, teacher-forced, and predictions of neighbouring merged tokens.

        Args:
            merged: the context; every sample has at least one valid token.
            targets: [B,T] long, -100 = padding, at the end only.
            align: compute the alignment predictions, if the prior was built with them.

        Returns:
            Logits [B,T,V] and both predictions [B,K,input_dim].
        """
        context = self._read(merged)
        hidden = self.trunk(*self._with_targets(context, targets[:, :-1].clamp(min=0)))
        merged_count = context.bias.shape[1]
        logits = self.head(hidden[:, merged_count:])
        if not align or self.forward_head is None or self.backward_head is None:
            return PriorOutput(logits)
        backward = self._read_backward(context, merged.mask)
        return PriorOutput(logits, self.forward_head(hidden[:, :merged_count]), self.backward_head(backward))

    def _read(self, merged: MergedTokens) -> _Context:
        weight = self.input_norm.weight
        embeddings = self.input_projection(self.input_norm(merged.values.to(weight.dtype)))
        positions = to_three_axes(merged.positions)
        start = merged.end
        if start is None:
            start = positions.amax(dim=-1).masked_fill(~merged.mask, -1).amax(dim=1) + 1
        # In fp32 at least: attention splits it for narrow dtypes.
        bias = key_bias(merged.size.to(torch.promote_types(weight.dtype, torch.float32)), merged.mask)
        return _Context(embeddings, positions, bias, start)

    def _after(self, context: _Context, embeddings: Tensor, offset: int) -> _Sequence:
        """Place [B,S,dim] embeddings of target tokens behind the context and ``offset`` earlier targets."""
        steps = torch.arange(offset, offset + embeddings.shape[1], device=embeddings.device)
        positions = (context.start[:, None] + steps)[..., None].expand(-1, -1, AXES)
        return embeddings, positions, context.bias.new_zeros(embeddings.shape[:2])

    def _with_targets(self, context: _Context, tokens: Tensor) -> _Sequence:
        """The sequence [context ; BOS ; tokens], tokens [B,S] long."""
        begin = self.begin.expand(tokens.shape[0], 1, -1)
        after = self._after(context, torch.cat([begin, self.embedding(tokens)], dim=1), offset=0)
        return _join((context.embeddings, context.positions, context.bias), after)

    def _read_backward(self, context: _Context, mask: Tensor) -> Tensor:
        """Hidden states over the valid merged tokens, read from last to first; [B,K,dim] in order of k."""
        index = torch.arange(mask.shape[1], device=mask.device)
        last = mask.sum(dim=1, keepdim=True) - 1
        # Reverses the valid tokens, leaves padding where it is, and is its own inverse.
        order = torch.where(index <= last, last - index, index)
        rows = order.unsqueeze(-1)
        hidden = self.trunk(
            context.embeddings.gather(1, rows.expand_as(context.embeddings)),
            context.positions.gather(1, rows.expand_as(context.positions)),
            context.bias.gather(1, order),
        )
        hidden_in_order: Tensor = hidden.gather(1, rows.expand_as(hidden))
        return hidden_in_order

    def generate(
        self,
        merged: MergedTokens,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Write target tokens after the context.

        Args:
            merged: the context.
            max_new_tokens: at most so many.
            temperature: 0 = greedy.
            top_p: share of the probability that is drawn from.
            eos_id: the end token; a row that wrote it is padded with it.
            generator: of the draws; ``None``: torch's default one.
            use_cache: keep keys and values; False reads the whole sequence again for each token.

        Returns:
            [B,<=max_new_tokens] long.

        Raises:
            UserError: bad settings, an empty context, or logits that are not finite.
        """
        tokens = self.stream(merged, max_new_tokens, temperature, top_p, eos_id, generator, use_cache)
        return torch.stack(list(tokens), dim=1)

    @torch.no_grad()
    def stream(
        self,
        merged: MergedTokens,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Write target tokens one at a time; arguments and errors as in ``generate``.

        Yields:
            [B] long, the next token of each sample.
        """
        check_sampling(temperature, top_p, max_new_tokens)
        if not bool(merged.mask.any(dim=1).all()):
            raise UserError("the prompt of a sample is empty; expected at least one token; give it a prompt")
        context = self._read(merged)
        finished = torch.zeros_like(merged.mask[:, 0])
        sequence = self._with_targets(context, merged.assignment.new_empty(finished.shape[0], 0))
        # The last token written is never read.
        capacity = sequence[0].shape[1] + max_new_tokens - 1
        cache = self.trunk.new_cache(finished.shape[0], capacity) if use_cache else None
        for step in range(max_new_tokens):
            logits = self.head(self.trunk(*sequence, cache)[:, -1])
            if cache is not None:
                cache.advance(sequence[0].shape[1])
            token = next_token(finite(logits), temperature, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished = finished | (token == eos_id)
            yield token
            if step + 1 == max_new_tokens or bool(finished.all()):
                return
            written = self._after(context, self.embedding(token[:, None]), offset=step + 1)
            sequence = written if use_cache else _join(sequence, written)

    def flops(self, merged_tokens: int, target_tokens: int) -> int:
        """Multiplications and additions of one sample's forward pass, without alignment.

        Args:
            merged_tokens: K.
            target_tokens: T, the end token included.

        Returns:
            Two per multiply-add; attention counted as in ``CausalTransformer.flops``.
        """
        dim = self.trunk.dim
        ends = 2 * dim * (merged_tokens * self.input_dim + target_tokens * self.vocab_size)
        return ends + self.trunk.flops(merged_tokens + target_tokens)
