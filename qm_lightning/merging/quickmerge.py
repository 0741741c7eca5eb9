"""QuickMerge++: anchors by salience, the rest joins the nearest anchor (spec quickmerge.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.merging.assemble import assemble, own_sizes
from qm_lightning.merging.base import BudgetMerger, Causality
from qm_lightning.merging.budget import Budget
from qm_lightning.merging.coverage import spread
from qm_lightning.merging.entropy_budget import EntropyBudget
from qm_lightning.merging.faint import with_faint_tokens
from qm_lightning.merging.grouping import nearest_anchor
from qm_lightning.merging.noise import Noise
from qm_lightning.merging.novelty import repetition
from qm_lightning.merging.salience import LOW_ENTROPY, Salience
from qm_lightning.merging.select import chosen_indices, top_mask
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

LEAST_SALIENCE = 0.01  # and 0.99 the most, so that odds are finite
STEEPEST = 64.0  # exp(-64) is a normal number in float32, and a sum of many exp(64) is finite


class QuickMerge(BudgetMerger):
    """Salience-weighted merging around the K most salient tokens.

    Args:
        budget: tokens left per sample; ``None``: ``EntropyBudget()``.
        learn_weights: learn the weights of the salience features, and a read-out of the values.
        locality: price of distance when a token chooses its anchor, in units of cosine similarity;
            distance 1 is the diagonal of the sample's grid.
        noise_scale: of the Gumbel noise on the choice of anchors in training.
        gate_temperature: of the gate's gradient.
        eps: mass of a token that is no anchor, and the least mass of an anchor.
        sharpness: a member of a group weighs ``(s / (1 - s))^sharpness`` in its average, s its salience, in place of
            the gate and ``eps`` (ours): what matters in a group speaks for it, and training sees every member. With
            learned salience and 1 it is a softmax of the standardised scores; 0 is the plain mean. ``None``: the
            specified rule, anchors by their salience and others by ``eps``.
        faint: in training with learned salience, tokens that are no anchors also stay by themselves, with this share
            of their size (ours): next to unseen, but salience learns what each would be worth. 0: they do not.
        novelty: share of its salience that a token of a clip loses when it repeats what lay at its place a step
            before, in [0,1]: what stands still is kept once, and the budget falls. Texts and pictures are not touched.
        coverage: share of the budget that goes to the most salient token of each part of the input, the parts being
            even blocks; the rest goes to the most salient tokens anywhere. In [0,1].
        salience_weights: of ``1 - entropy``, ``norm`` and ``received``, where learning starts.
        seed: of the noise.
        input_dim: width of the tokens, for ``learn_weights`` outside a QuickMergeModule.
        layers: attention layers, likewise; ``None``: one set of weights for all.
    """

    causality: ClassVar[Causality] = "global"

    def __init__(
        self,
        budget: Budget | None = None,
        learn_weights: bool = False,
        locality: float = 0.1,
        noise_scale: float = 0.1,
        gate_temperature: float = 0.1,
        eps: float = 0.01,
        sharpness: float | None = None,
        faint: float = 0.0,
        novelty: float = 0.0,
        coverage: float = 0.0,
        salience_weights: tuple[float, float, float] = LOW_ENTROPY,
        seed: int = 0,
        input_dim: int | None = None,
        layers: int | None = None,
    ) -> None:
        super().__init__(EntropyBudget() if budget is None else budget)
        self.salience = Salience(salience_weights, learn_weights)
        self.noise = Noise(seed)
        self.locality, self.noise_scale, self.gate_temperature = locality, noise_scale, gate_temperature
        self.eps, self.sharpness, self.faint = eps, sharpness, faint
        if sharpness is not None and not 0.0 <= sharpness < float("inf"):
            raise UserError(f"QuickMerge(sharpness={sharpness}): expected None, or a number from 0 up")
        if not 0.0 <= faint < 1.0:
            raise UserError(f"QuickMerge(faint={faint}): expected a share in [0, 1)")
        if not 0.0 <= novelty <= 1.0:
            raise UserError(f"QuickMerge(novelty={novelty}): expected a share in [0, 1]")
        if not 0.0 <= coverage <= 1.0:
            raise UserError(f"QuickMerge(coverage={coverage}): expected a share in [0, 1]")
        self.novelty, self.coverage = novelty, coverage
        if input_dim is not None:
            self.salience.build(input_dim, layers)

    def build(self, input_dim: int, layers: int) -> None:
        """Make the salience's parameters, once."""
        self.salience.build(input_dim, layers)

    @property
    def reads_attention(self) -> bool:
        """Always: salience comes from it."""
        return True

    @property
    def reads_received(self) -> bool:
        """With a weight on it."""
        return self.salience.initial[2] != 0

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Merge a batch; gradients reach values and salience."""
        salience = self.salience(tokens)
        if self.novelty > 0:
            salience = salience * (1.0 - self.novelty * repetition(tokens).to(salience.dtype))
        return self.merge(tokens, salience)

    def merge(self, tokens: Tokens, salience: Tensor) -> MergedTokens:
        """Merge by a given salience.

        Args:
            tokens: the input.
            salience: [B,N] float.

        Returns:
            The merged tokens, in the order of their anchors; ready with their last member.
        """
        counts = self.counts(tokens, salience)
        scores = salience
        if self.training and self.noise_scale > 0:
            scores = salience + self.noise_scale * self.noise.gumbel(tokens).to(salience.dtype)
        order = spread(tokens, scores, counts, self.coverage) if self.coverage > 0 else scores
        chosen = top_mask(order, tokens.mask, counts, tokens.protected)
        anchors = chosen_indices(chosen, self.slots(tokens, counts))
        assignment = nearest_anchor(tokens, chosen, anchors, counts, self.locality)
        gate = self._gate(scores, chosen, tokens)
        mass = self._mass(salience, gate)
        if tokens.size is not None:
            mass = mass * own_sizes(tokens)
        merged = assemble(tokens, assignment, mass, anchors, counts, whole=False)
        # Between the layers of a backbone as many tokens must leave as the schedule says.
        if self.training and self.faint > 0 and scores.requires_grad and tokens.keep is None:
            return with_faint_tokens(tokens, merged, chosen, gate, self.faint)
        return merged

    def _mass(self, salience: Tensor, gate: Tensor) -> Tensor:
        """What each token weighs in the average of its group, [B,N]."""
        if self.sharpness is not None:
            odds = torch.logit(salience.clamp(LEAST_SALIENCE, 1.0 - LEAST_SALIENCE))
            return torch.exp((self.sharpness * odds).clamp(-STEEPEST, STEEPEST))
        return gate * salience.clamp(min=self.eps) + (1.0 - gate) * self.eps

    def _gate(self, scores: Tensor, chosen: Tensor, tokens: Tokens) -> Tensor:
        """1 for anchors, 0 for others; its gradient is a sigmoid's around the border between them."""
        hard = chosen.to(scores.dtype)
        if not scores.requires_grad:
            return hard
        free = tokens.mask if tokens.protected is None else tokens.mask & ~tokens.protected
        last_in = scores.masked_fill(~(chosen & free), float("inf")).amin(1, keepdim=True)
        first_out = scores.masked_fill(chosen | ~free, -float("inf")).amax(1, keepdim=True)
        border = torch.where(
            first_out.isfinite(), 0.5 * (last_in + first_out), last_in - self.gate_temperature
        )
        soft = torch.sigmoid((scores - border.detach()) / self.gate_temperature)
        return hard + torch.where(free, soft - soft.detach(), 0.0)

    @classmethod
    def compress(
        cls,
        hidden_states: Tensor,
        attention: AttentionStats | Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        budget: Budget | None = None,
    ) -> MergedTokens:
        """Merge the hidden states of any model in one call, without noise.

        Args:
            hidden_states: [B,N,D] float.
            attention: statistics, or attention weights after the softmax, [B,heads,N,N] for each layer or of one.
            mask: [B,N] bool or 0/1, True = real token; ``None``: all are.
            budget: tokens left per sample; ``None``: ``EntropyBudget()``.

        Returns:
            The merged tokens.

        Raises:
            UserError: no attention weights, or shapes that do not fit each other.
        """
        if hidden_states.ndim != 3:
            raise UserError(
                f"hidden_states has shape {list(hidden_states.shape)}; expected [B,N,D]; give a batch, of one sample "
                "hidden_states[None]"
            )
        B, N, _ = hidden_states.shape
        device = hidden_states.device
        mask = torch.ones(B, N, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if mask.shape != (B, N):
            raise UserError(
                f"mask has shape {list(mask.shape)} and hidden_states {list(hidden_states.shape)}; expected "
                f"{[B, N]}; give the mask of the same tokens"
            )
        if not isinstance(attention, AttentionStats):
            layers = [attention] if isinstance(attention, Tensor) else list(attention or ())
            check_weights(layers, B, N)
            attention = stats_of_weights(layers, mask)
        positions = torch.arange(N, device=device).expand(B, N).unsqueeze(-1)
        merger = cls(budget=budget).to(device).eval()
        merged: MergedTokens = merger(Tokens(hidden_states, mask, positions, attention))
        return merged


def check_weights(layers: Sequence[Tensor | None], samples: int, tokens: int) -> None:
    """Refuse attention weights that a model did not write out, or those of other tokens.

    Raises:
        UserError: there are none, or their shape is not [B,heads,N,N].
    """
    if not layers or any(w is None for w in layers):
        raise UserError(
            "found no attention weights; expected [B,heads,N,N] for each layer; load the model with "
            'attn_implementation="eager" and call it with output_attentions=True'
        )
    for w in layers:
        if w is not None and (w.ndim != 4 or w.shape[0] != samples or w.shape[2:] != (tokens, tokens)):
            raise UserError(
                f"attention weights have shape {list(w.shape)}; expected [{samples}, heads, {tokens}, {tokens}], as "
                "hidden_states has; give both of the same tokens"
            )


def stats_of_weights(weights: Sequence[Tensor], mask: Tensor) -> AttentionStats:
    """Statistics of attention weights that a model has written out.

    The norm is 0 throughout: it needs the attention's values.

    Args:
        weights: per layer [B,heads,N,N] float, rows sum to 1.
        mask: [B,N] bool.

    Returns:
        Statistics of L = len(weights) layers.
    """
    layers = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    entropy = []
    for w in layers:
        visible = (w > 0).any(1).sum(-1)
        scale = visible.to(w.dtype).log()
        row = torch.special.entr(w).sum(-1).mean(1)
        entropy.append(torch.where(visible > 1, row / scale.clamp(min=1e-12), 0.0).clamp(0.0, 1.0))
    real = mask[:, None, :, None]
    received = [w.masked_fill(~real, 0.0).mean(1).sum(1) for w in layers]
    stacked = torch.stack(entropy)
    return AttentionStats(stacked, torch.zeros_like(stacked), torch.stack(received))
