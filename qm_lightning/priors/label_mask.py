"""Who may attend to whom when labels are next tokens: a bidirectional prefix, and labels that never meet.

The sequence is [visual tokens ; prompt ; label 1, SEP ; label 2, SEP ; ...]. Its last prompt token is the
*anchor* (generative.md, section 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LabelVariant = Literal["strict", "repo"]


class LabelLayout(NamedTuple):
    """Where each label token stands.

    Attributes:
        block: [B,T] long, the label that a token belongs to; SEP closes its own label.
        offset: [B,T] long, place in that label.
        closed: [B,T] bool, the label ends with a SEP.
    """

    block: Tensor
    offset: Tensor
    closed: Tensor


def label_layout(labels: Tensor, sep_id: int) -> LabelLayout:
    """Find the labels in a row of tokens.

    Args:
        labels: [B,T] long, each label's tokens and then SEP; -100 = padding, at the end only.
        sep_id: SEP.

    Returns:
        The layout; what it says of padding means nothing.
    """
    ends = (labels == sep_id).long()
    before = ends.cumsum(dim=1) - ends
    index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.where(before > 0, index.masked_fill(ends == 0, -1).cummax(dim=1).values.roll(1, 1) + 1, 0)
    return LabelLayout(before, index - first, before < ends.sum(dim=1, keepdim=True))


def prefix_label_mask(
    visual: int, prompt: int, labels: Tensor, sep_id: int, variant: LabelVariant = "strict"
) -> Tensor:
    """Build the attention mask.

    Visual tokens see each other and nothing else; a prompt token sees the visual tokens and the prompt up to
    itself; a label's token sees visual tokens, prompt and its own label up to itself. ``repo`` is the mask as
    the paper's code builds it: there the last label has no SEP, and its tokens see the prefix only, not even
    themselves.

    Args:
        visual: visual tokens at the start.
        prompt: prompt tokens behind them.
        labels: [B,T] long, each label's tokens and then SEP; -100 = padding.
        sep_id: SEP.
        variant: ``strict`` or ``repo``.

    Returns:
        [B,S,S] bool with S = visual + prompt + T; True = the row may attend to the column. Padding sees the
        prefix, so that no row is empty.
    """
    layout = label_layout(labels, sep_id)
    batch, tokens = labels.shape
    prefix = visual + prompt
    index = torch.arange(prefix + tokens, device=labels.device)
    causal = index <= index[:, None]
    mask = (causal | (index < visual)).expand(batch, -1, -1).clone()
    mask[:, :visual, visual:] = False
    real = labels >= 0
    own = (layout.block[:, :, None] == layout.block[:, None, :]) & real[:, :, None] & real[:, None, :]
    if variant == "repo":
        own = own & layout.closed[:, :, None]
    mask[:, prefix:, prefix:] &= own
    return mask
