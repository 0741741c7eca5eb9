"""What every merger is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qm_lightning.described import Described
from qm_lightning.errors import UserError
from qm_lightning.merging.budget import Budget, FixedBudget
from qm_lightning.merging.salience import low_entropy
from qm_lightning.merging.select import width
from qm_lightning.tokens import MergedTokens, Tokens

Causality = Literal["streaming", "ordered", "global"]

PROTECTED_ROOM = 16  # most protected tokens of a sample on an accelerator, where their number is not read


class Merger(Described, nn.Module, ABC):
    """Tokens -> MergedTokens.

    Attributes:
        causality: ``streaming``: a merged token depends on the past only; ``ordered``: order is kept, but the
            decision looks at the whole sequence; ``global``: groups span distant positions.
        inside: it works between the layers of the backbone, whose compute it saves (``InBackbone``).
    """

    causality: ClassVar[Causality] = "global"
    inside: ClassVar[bool] = False

    def build(self, input_dim: int, layers: int) -> None:
        """Make parameters for tokens of width ``input_dim`` and ``layers`` attention layers; here: none."""

    @property
    def reads_attention(self) -> bool:
        """Whether it goes by the backbone's attention statistics, which cost a second attention pass."""
        return self.reads_received

    @property
    def reads_received(self) -> bool:
        """Whether it needs the attention that each token receives, which a backbone records on request."""
        return False

    @property
    def needs_text(self) -> bool:
        """Whether it refuses samples without a paired text (``Tokens.context``)."""
        return False

    def require_text_given(self, given: bool, option: str = "model.context") -> None:
        """Refuse at start-up what would fail at the first batch.

        Args:
            given: whether something will put a paired text into the tokens' space.
            option: the user's name of that.

        Raises:
            UserError: it needs a text and will get none.
        """
        if self.needs_text and not given:
            raise UserError(
                f"{type(self).__name__} was told to require a text and will get none: {option} is not set; expected "
                "vectors for the words of a question, and paired data; set it, or leave require_text out"
            )

    def prepare(self, backbone: Any) -> None:
        """Make parameters for a backbone, once, before the optimiser exists; and have it record what is read.

        Args:
            backbone: an ``HFBackbone``, or what has its ``hidden_size``, ``layers`` and ``received``.
        """
        if self.reads_received:
            backbone.received = True
        self.build(backbone.hidden_size, len(backbone.layers))

    @abstractmethod
    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch."""

    def read(self, backbone: Any, inputs: dict[str, Tensor]) -> Tokens:
        """The backbone's tokens, with statistics only where this merger goes by them."""
        tokens: Tokens = backbone(inputs, statistics=self.reads_attention)
        return tokens

    def encode(self, backbone: Any, inputs: dict[str, Tensor], plain: Tokens | None = None) -> MergedTokens:
        """What the prior reads of a batch: the backbone's tokens, merged.

        Args:
            backbone: inputs -> ``Tokens``.
            inputs: as the backbone takes them.
            plain: what the backbone makes of them, where it is known; ``None``: it is asked.

        Returns:
            The merged tokens.
        """
        merged: MergedTokens = self(self.read(backbone, inputs) if plain is None else plain)
        return merged

    def __call__(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; a sample without a valid token is an error."""
        require_tokens(tokens.mask)
        merged: MergedTokens = super().__call__(tokens)
        return merged


class BudgetMerger(Merger):
    """A merger that decides on the whole sequence how many tokens are left.

    Args:
        budget: tokens left per sample; ``None``: ``FixedBudget()``.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        super().__init__()
        self.budget = FixedBudget() if budget is None else budget

    def prepare(self, backbone: Any) -> None:
        """As for every merger; refuses a compression that the backbone's samples cannot reach."""
        require_reach(self.budget, backbone)
        super().prepare(backbone)

    @property
    def reads_attention(self) -> bool:
        """Where its budget counts salience, too."""
        return self.reads_received or self.budget.reads_salience

    def counts(self, tokens: Tokens, salience: Tensor | None = None) -> Tensor:
        """Tokens left: as ``Tokens.keep`` says, or else :func:`wanted_counts`, [B] long."""
        return wanted_counts(self.budget, tokens, salience) if tokens.keep is None else tokens.keep.counts

    def slots(self, tokens: Tokens, counts: Tensor) -> int:
        """K of the batch: the largest count on the CPU, the budget's bound on an accelerator."""
        N = tokens.mask.shape[1]
        if tokens.keep is not None:
            return width(counts, tokens.keep.most)
        bound = self.budget.bound(N)
        if tokens.protected is not None:
            bound = min(N, max(bound, PROTECTED_ROOM + 1))
            if counts.device.type != "cpu":
                torch._assert_async(
                    (counts <= bound).all(), "more protected tokens than the budget leaves room for"
                )
        return width(counts, bound)


def wanted_counts(budget: Budget, tokens: Tokens, salience: Tensor | None = None) -> Tensor:
    """What the budget says, but never fewer than the protected tokens and one more.

    Args:
        budget: of the merger.
        tokens: the input.
        salience: [B,N] float; ``None``: by low entropy if the budget reads salience at all.

    Returns:
        [B] long.
    """
    if salience is None:
        salience = low_entropy(tokens) if budget.reads_salience else tokens.mask.float()
    counts: Tensor = budget(salience, tokens.mask)
    if tokens.protected is None:
        return counts
    protected = (tokens.protected & tokens.mask).sum(1)
    return counts.maximum((protected + 1).minimum(tokens.counts))


def require_reach(budget: Budget, backbone: Any) -> None:
    """Refuse a compression of more tokens than a sample has.

    Args:
        budget: of the merger; one without ``compression`` reaches what it reaches.
        backbone: its ``sample_tokens``, where it has them, is the most that a sample can have.

    Raises:
        UserError: names both numbers.
    """
    tokens = getattr(backbone, "sample_tokens", None)
    compression = getattr(budget, "compression", 1.0)
    if tokens is not None and compression > tokens:
        raise UserError(
            f"compression={compression:g} was asked of samples of {tokens} tokens, of which one at least is "
            f"left; expected at most {tokens}; lower the compression, or choose a backbone of smaller patches"
        )


def require_tokens(mask: Tensor) -> None:
    """Refuse a sample without a valid token.

    Args:
        mask: [B,N] bool.

    Raises:
        UserError: names the samples. On an accelerator the check runs there and does not stall it.
    """
    filled = mask.any(dim=1)
    if mask.device.type != "cpu":
        torch._assert_async(filled.all(), "a sample of the batch has no valid token")
    elif not bool(filled.all()):
        rows = (~filled).nonzero().flatten().tolist()
        raise UserError(
            f"samples {rows} of the batch have no valid token; expected at least one each; "
            "leave empty samples out of the shards"
        )
