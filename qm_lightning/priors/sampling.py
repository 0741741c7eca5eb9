"""From logits to the next token: temperature, nucleus, greedy."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_lightning.errors import UserError


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuse settings that cannot be sampled from.

    Raises:
        UserError: a negative or non-finite temperature, ``top_p`` outside (0, 1], no token asked for.
    """
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}; expected 0 (greedy) or more; mend it")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p={top_p}; expected a share in (0, 1]; 1 keeps every token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}; expected at least 1; raise it")


def next_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token per sample.

    Args:
        logits: [B,V] float.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: draw from the smallest set of likeliest tokens whose probabilities reach this sum.
        generator: of the draws, on the logits' device; ``None``: torch's default one.

    Returns:
        [B] long.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # From the largest one, and by no less than a float holds: a temperature near 0 then is greedy, not NaN.
    heights = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = (heights / max(temperature, torch.finfo(logits.dtype).tiny)).softmax(dim=-1)
    if top_p < 1.0:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays if the ones before it do not reach top_p yet: the likeliest always does.
        outside = ranked.cumsum(dim=-1) - ranked >= top_p
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(outside, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def finite(logits: Tensor) -> Tensor:
    """The logits themselves, if they can be sampled from.

    Raises:
        UserError: some are not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            "the prior's logits are not finite; expected numbers; the weights diverged in training or the "
            "input holds NaN: use an earlier checkpoint, or look at the input"
        )
    return logits
