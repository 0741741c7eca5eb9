"""torch.compile on the parts that are trained: in place, so that no key of a checkpoint changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.priors import PriorOutput
from qm_lightning.tokens import MergedTokens


@dataclass
class CompileOptions:
    """What is compiled. Off by default: whether it pays depends on the machine (docs/generation.md).

    Attributes:
        prior: compile the prior.
        merger: compile the merger.
        bucket: with a compiled prior, round the numbers of merged tokens and of target tokens up to a multiple of
            this, so that few shapes are compiled; 1 = as they come.
    """

    prior: bool = False
    merger: bool = False
    bucket: int = 16

    def __post_init__(self) -> None:
        if self.bucket < 1:
            raise UserError(f"compile.bucket={self.bucket}; expected at least 1; raise it")


def compile_in_place(prior: nn.Module, merger: nn.Module, options: CompileOptions) -> None:
    """Compile the parts that ``options`` names; modules, parameters and keys stay what they are."""
    if options.prior:
        prior.compile(dynamic=False if options.bucket > 1 else None)
    if options.merger:
        merger.compile()


def call_in_buckets(
    prior: Any, merged: MergedTokens, targets: Tensor, options: CompileOptions
) -> tuple[MergedTokens, PriorOutput]:
    """What a prior says of targets; a compiled one is given shapes from a few buckets.

    Args:
        prior: merged tokens and targets -> ``PriorOutput``.
        merged: the context.
        targets: [B,T] long, -100 = padding, at the end only.
        options: what is compiled.

    Returns:
        The merged tokens as the prior read them, and its output with logits [B,T,V].
    """
    if not options.prior:
        return merged, prior(merged, targets)
    merged, length = in_buckets(merged, options.bucket), targets.shape[1]
    output: PriorOutput = prior(merged, F.pad(targets, (0, -length % options.bucket), value=-100))
    return merged, replace(output, logits=output.logits[:, :length])


def in_buckets(merged: MergedTokens, multiple: int) -> MergedTokens:
    """Pad merged tokens, and those they were made of, to a multiple, which changes nothing for the real ones.

    Args:
        merged: K of them, of N tokens.
        multiple: of the number of slots wanted.

    Returns:
        The same, with K rounded up, and N where ``unmerged`` tokens are there.
    """
    more = -merged.mask.shape[1] % multiple
    tokens = merged.unmerged
    if tokens is not None and (behind := -tokens.shape[1] % multiple):
        merged = replace(merged, unmerged=F.pad(tokens, (0, 0, 0, behind)))
    if not more:
        return merged
    return replace(
        merged,
        values=F.pad(merged.values, (0, 0, 0, more)),
        mask=F.pad(merged.mask, (0, more)),
        size=F.pad(merged.size, (0, more)),
        positions=F.pad(merged.positions, (0, 0, 0, more)),
        ready=F.pad(merged.ready, (0, more)),
        anchors=None if merged.anchors is None else F.pad(merged.anchors, (0, more)),
        faint=None if merged.faint is None else F.pad(merged.faint, (0, more)),
    )
