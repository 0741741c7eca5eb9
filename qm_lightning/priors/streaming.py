"""The prior in streaming mode: the text itself is merged while it is read, and every token is predicted.

A global transformer reads merged tokens; a light local decoder predicts original token t from the tokens
before t (those of its window), from what the causal backbone made of them, and from the newest merged token
that is *ready* before t. Row t reads nothing but functions of tokens < t, so the product of the predictions is
an exact, normalised likelihood (generative.md, section 6, conditions C1 to C8), if the backbone is causal and
the merger "streaming".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.described import Described
from qm_lightning.errors import UserError
from qm_lightning.priors.ar_prior import PriorOutput
from qm_lightning.priors.cache import KVCache
from qm_lightning.priors.growing import Encoder, GrowingText
from qm_lightning.priors.ready import ready_before
from qm_lightning.priors.rope import AXES, to_three_axes
from qm_lightning.priors.sampling import check_sampling, finite, next_token
from qm_lightning.priors.transformer import PADDED, CausalTransformer, key_bias
from qm_lightning.tokens import MergedTokens


def check_streaming(merger: str, causality: str, causal_backbone: bool) -> None:
    """Refuse what would let a prediction see its own future.

    Args:
        merger: name of the merger, for the message.
        causality: its class.
        causal_backbone: whether the backbone's token i sees only tokens <= i.

    Raises:
        UserError: the merger is not "streaming", or the backbone looks ahead.
    """
    reasons = {
        "ordered": "its budget reads the whole sequence, so early merges depend on later tokens",
        "global": "its groups join tokens from anywhere in the sequence",
    }
    if causality != "streaming":
        raise UserError(
            f"prior mode streaming with merger {merger} of class {causality!r}: {reasons[causality]}, and "
            "the likelihood would leak; expected class 'streaming'; take StreamingQuickMerge, or the "
            "conditioning mode"
        )
    if not causal_backbone:
        raise UserError(
            "prior mode streaming with a backbone that attends in both directions: each token already holds "
            "its future; expected a causal backbone; take a decoder model, or the conditioning mode"
        )


def streaming_targets(input_ids: Tensor, mask: Tensor) -> Tensor:
    """The text itself as targets of the streaming prior.

    Args:
        input_ids: [B,N] long.
        mask: [B,N] bool or 0/1, True = real token.

    Returns:
        [B,N] long, -100 = padding.
    """
    return input_ids.masked_fill(mask == 0, -100)


class StreamingPrior(Described, nn.Module):
    """Predicts every token of a text from merged tokens that are ready and from the last few tokens.

    Args:
        input_dim: width of merged tokens.
        vocab_size: of the text's tokens.
        dim: width of the global transformer.
        depth: its blocks.
        heads: its attention heads.
        local_dim: width of the local decoder.
        local_depth: its blocks.
        local_heads: its attention heads.
        window: tokens that each of its layers sees; at least the merger's longest span, so that the open span
            is always read.
        read_backbone: the local decoder reads the backbone's state of each token of its window, not only which
            token it is.
        dropout: of residual branches; call ``eval()`` before generating.
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
        local_dim: int = 128,
        local_depth: int = 1,
        local_heads: int = 4,
        window: int = 16,
        read_backbone: bool = True,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.input_dim, self.vocab_size, self.window = input_dim, vocab_size, window
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_projection = nn.Linear(input_dim, dim)
        self.start = nn.Parameter(torch.randn(dim) * 0.5)
        self.trunk = CausalTransformer(dim, depth, heads, dropout, rope_base)
        self.state_projection = nn.Linear(dim, local_dim, bias=False)
        self.begin = nn.Parameter(torch.randn(local_dim) * 0.5)
        self.skip = (
            nn.Sequential(nn.LayerNorm(input_dim), nn.Linear(input_dim, local_dim, bias=False))
            if read_backbone
            else None
        )
        self.embedding = nn.Embedding(vocab_size, local_dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.local = CausalTransformer(local_dim, local_depth, local_heads, dropout, rope_base, window)
        self.head = nn.Linear(local_dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, merged: MergedTokens, targets: Tensor) -> PriorOutput:
        """Logits of every token of the text.

        Args:
            merged: of the same text.
            targets: [B,T] long, the text's tokens, T <= N + 1 (one more token may follow, an end token);
                -100 = padding, at the end only.

        Returns:
            Logits [B,T,V]; row t predicts token t from tokens < t.
        """
        states = self.states(*self.read(merged), cache=None)
        rows = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
        previous = self.embed(merged, targets.roll(1, dims=1), rows)
        return PriorOutput(self.predict(states, ready_before(merged, rows), previous, rows))

    def read(self, merged: MergedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """The global sequence [start ; merged]: [B,1+K,dim], [B,1+K,3], [B,1+K]."""
        weight = self.input_norm.weight
        embeddings = self.input_projection(self.input_norm(merged.values.to(weight.dtype)))
        start = self.start.expand(embeddings.shape[0], 1, -1)
        # One further on, so that the start vector has a place of its own.
        positions = F.pad(to_three_axes(merged.positions) + 1, (0, 0, 1, 0))
        bias = key_bias(merged.size.to(torch.promote_types(weight.dtype, torch.float32)), merged.mask)
        return torch.cat([start, embeddings], dim=1), positions, F.pad(bias, (1, 0))

    def states(self, x: Tensor, positions: Tensor, bias: Tensor, cache: KVCache | None) -> Tensor:
        """Run the global transformer.

        Args:
            x: [B,S,dim] of the global sequence.
            positions: [B,S,3] long.
            bias: [B,S].
            cache: what was read before, if any.

        Returns:
            [B,S,local_dim], what the local decoder is told of the sequence up to each place.
        """
        states: Tensor = self.state_projection(self.trunk(x, positions, bias, cache))
        return states

    def embed(self, merged: MergedTokens, previous: Tensor, rows: Tensor) -> Tensor:
        """What the local decoder reads of the token before each row: which one it is, and the backbone's state of it.

        Args:
            merged: of the text, with its ``unmerged`` tokens.
            previous: [B,R] long, the token before each row; anything where there is none.
            rows: [B,R] long, index of each row in the text.

        Returns:
            [B,R,local_dim].

        Raises:
            UserError: the merger kept no ``unmerged`` tokens.
        """
        embedded = self.embedding(previous.clamp(min=0))
        if self.skip is not None:
            if merged.unmerged is None:
                raise UserError(
                    "the prior reads the backbone's state of each token and the merger kept none; expected "
                    "MergedTokens.unmerged; set it in the merger, or --model.prior.read_backbone false"
                )
            # Rows of padded targets may lie behind the text; they read its last state, and nothing reads them.
            index = (rows - 1).clamp(0, merged.unmerged.shape[1] - 1).unsqueeze(-1)
            before = merged.unmerged.gather(1, index.expand(-1, -1, merged.unmerged.shape[-1]))
            embedded = embedded + self.skip(before.to(embedded.dtype))
        return torch.where((rows > 0).unsqueeze(-1), embedded, self.begin)

    def predict(self, states: Tensor, newest: Tensor, previous: Tensor, rows: Tensor) -> Tensor:
        """Logits of consecutive rows.

        Args:
            states: [B,1+K,local_dim].
            newest: [B,R] long, index in ``states`` of the newest state that each row may read.
            previous: [B,R,local_dim], of the token before each row, from ``embed``.
            rows: [B,R] long, index of each row in the text; below 0: no row, and nothing sees it.

        Returns:
            [B,R,V]; right where the rows before are given as far as the local decoder sees.
        """
        told = states.gather(1, newest.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        positions = rows.unsqueeze(-1).expand(-1, -1, AXES)
        bias = torch.zeros_like(rows, dtype=torch.float32).masked_fill(rows < 0, PADDED)
        hidden = self.local(previous + told, positions, bias)
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def reach(self) -> int:
        """Rows that the local decoder's prediction depends on, itself included."""
        return self.local.depth * (self.window - 1) + 1

    def generate(
        self,
        encode: Encoder,
        prompts: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue texts; arguments and errors as in ``stream``.

        Returns:
            [B,<=max_new_tokens] long.
        """
        return torch.stack(
            list(self.stream(encode, prompts, mask, max_new_tokens, temperature, top_p, eos_id, generator)),
            dim=1,
        )

    @torch.no_grad()
    def stream(
        self,
        encode: Encoder,
        prompts: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue texts, merging while they grow.

        Each merged token enters the global transformer once, when it is ready, and stays in its key-value
        cache. The local decoder reads the last ``reach`` rows again for each token: it has no cache.

        Args:
            encode: backbone and merger: the merged tokens of all tokens so far. It is called once per token;
                whether it keeps the backbone's own cache is its business.
            prompts: [B,N] long, the texts so far, padded at the end.
            mask: [B,N] bool, True = real token; each row has at least one.
            max_new_tokens: at most so many.
            temperature: 0 = greedy.
            top_p: share of the probability that is drawn from.
            eos_id: the end token; a row that wrote it is padded with it.
            generator: of the draws; ``None``: torch's default one.

        Yields:
            [B] long, the next token of each sample.

        Raises:
            UserError: bad settings, an empty prompt, or logits that are not finite.
        """
        check_sampling(temperature, top_p, max_new_tokens)
        if not bool(mask.any(dim=1).all()):
            raise UserError("the prompt of a sample is empty; expected at least one token; give it a prompt")
        text = GrowingText(self, encode, prompts, mask, max_new_tokens)
        finished = torch.zeros_like(mask[:, 0])
        for step in range(max_new_tokens):
            token = next_token(finite(text.logits()), temperature, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished = finished | (token == eos_id)
            yield token
            if step + 1 == max_new_tokens or bool(finished.all()):
                return
            text.append(token)

    def flops(self, merged_tokens: int, target_tokens: int) -> int:
        """Multiplications and additions of one sample's forward pass.

        Args:
            merged_tokens: K.
            target_tokens: T.

        Returns:
            Two per multiply-add; attention counted as in ``CausalTransformer.flops``.
        """
        states = merged_tokens + 1
        ends = merged_tokens * self.input_dim * self.trunk.dim + states * self.trunk.dim * self.local.dim
        ends += target_tokens * self.local.dim * self.vocab_size
        if self.skip is not None:
            ends += target_tokens * self.input_dim * self.local.dim
        return 2 * ends + self.trunk.flops(states) + self.local.flops(target_tokens)
