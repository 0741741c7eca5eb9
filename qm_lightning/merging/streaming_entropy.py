"""A span closes where the next token is hard to guess: BLT's patching (spec reduction.md, section 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.streaming_base import StreamingMerger, merge_spans
from qm_lightning.merging.streaming_threshold import ClosingThreshold
from qm_lightning.ranks import global_mean
from qm_lightning.tokens import MergedTokens, Tokens

# BLT's own threshold, in nats.
BLT_THRESHOLD = 1.3354


class EntropyThreshold(StreamingMerger):
    """Closes a span with token t where a small model's guess of the next token has much entropy.

    The first span has one token. BLT trains a separate model for the entropies; here it is a linear head on
    the frozen backbone, trained beside the prior by its own cross-entropy (loss ``entropy_model``), and the
    threshold follows from the compression (BLT searches it by hand). Spans are averaged, where BLT pools them
    by attention. BLT's other mode, the top-k entropies of a sequence, looks ahead and is not offered.

    Args:
        budget: ``FixedBudget(compression)``, tokens per span over all samples.
        vocab_size: of the text; 257: bytes and an end.
        monotone: compare the rise of the entropy over the token before, not the entropy itself.
        max_span: longest span in tokens.
        input_dim: width of the tokens; the module gives it by ``build`` otherwise.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        vocab_size: int = 257,
        monotone: bool = False,
        max_span: int | None = 16,
        input_dim: int | None = None,
    ) -> None:
        super().__init__(budget, max_span)
        self.threshold = ClosingThreshold(self.compression, 0.0 if monotone else BLT_THRESHOLD)
        self.vocab_size, self.monotone = vocab_size, monotone
        self.norm: nn.LayerNorm | None = None
        self.head: nn.Linear | None = None
        if input_dim is not None:
            self.build(input_dim, 0)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the head of the entropy model."""
        if self.head is None:
            self.norm = nn.LayerNorm(input_dim)
            self.head = nn.Linear(input_dim, self.vocab_size)

    def signal(self, logits: Tensor) -> Tensor:
        """What is compared with the threshold.

        Args:
            logits: [B,N,V] of the token after each one.

        Returns:
            [B,N] float, nats; infinite for the first token.
        """
        log_p = logits.detach().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        if self.monotone:
            entropy = entropy - F.pad(entropy[:, :-1], (1, 0))
        return torch.cat([torch.full_like(entropy[:, :1], float("inf")), entropy[:, 1:]], dim=1)

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; in training also trains the head and moves the threshold by one step.

        Raises:
            UserError: the head was not built, or training without token ids.
        """
        if self.norm is None or self.head is None:
            raise UserError("EntropyThreshold needs the width of the tokens: pass input_dim=")
        logits = self.head(self.norm(tokens.values.to(self.norm.weight.dtype)))
        signal = self.signal(logits)
        losses = {"entropy_model": self._loss(logits, tokens)} if self.training else {}
        merged = merge_spans(tokens, self.threshold(signal), torch.ones_like(signal), self.max_span, losses)
        if self.training:
            first = torch.arange(signal.shape[1], device=signal.device) == 0
            self.threshold.adapt(signal.masked_fill(first, 0.0), tokens.mask & ~first, merged.mask.sum(dim=1))
        return merged

    @staticmethod
    def _loss(logits: Tensor, tokens: Tokens) -> Tensor:
        if tokens.ids is None:
            raise UserError(
                "EntropyThreshold learns to guess tokens and found no Tokens.ids; expected a text "
                "backbone that gives them; use one, or another streaming merger"
            )
        following = tokens.mask[:, 1:] & tokens.mask[:, :-1]
        targets = tokens.ids[:, 1:].masked_fill(~following, -100)
        guesses = logits[:, :-1].flatten(0, 1)
        total = F.cross_entropy(guesses, targets.flatten(), ignore_index=-100, reduction="sum")
        return global_mean(total, following.sum())
