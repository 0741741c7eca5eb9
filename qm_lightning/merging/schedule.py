"""How many tokens are left after each place of a backbone in which tokens are removed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qm_lightning.described import Described
from qm_lightning.errors import UserError


class Schedule(Described):
    """Places in a backbone, and how the removals are shared out among them; the total is always exact.

    Args:
        layers: indices of the layers before which tokens are removed, ascending; ``None``: all but the first.
            DynamicViT's are 3, 6, 9 of 12.
        shape: ``linear``: the number of removed tokens goes linearly from the first place to the last, ToMe's
            schedule; ``geometric``: the same share of tokens is left at each place, DynamicViT's.
        slope: of ``linear``, in [-1,1]: -1 removes most at the first place and nothing at the last, 0 equally
            many everywhere, 1 most at the last. What rounding leaves over goes to the first place where the
            slope is negative, else to the last.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        shape: Literal["linear", "geometric"] = "linear",
        slope: float = 0.0,
    ) -> None:
        if shape not in ("linear", "geometric"):
            raise UserError(f"Schedule(shape={shape!r}): expected linear or geometric")
        if not -1.0 <= slope <= 1.0:
            raise UserError(f"Schedule(slope={slope}): expected a number in [-1, 1]")
        if layers is not None and (not layers or layers != sorted(set(layers))):
            raise UserError(f"Schedule(layers={layers}): expected indices in ascending order, each once")
        self.layers, self.shape, self.slope = layers, shape, slope

    def places(self, depth: int) -> tuple[int, ...]:
        """Indices of the layers before which tokens are removed.

        Args:
            depth: layers of the backbone.

        Raises:
            UserError: the backbone has no such layer, or only one layer.
        """
        chosen = list(range(1, depth)) if self.layers is None else self.layers
        if not chosen or chosen[0] < 1 or chosen[-1] >= depth:
            raise UserError(
                f"the schedule removes tokens before layers {chosen} of a backbone with {depth}; expected "
                f"indices from 1 to {depth - 1}: before layer 0 no attention was seen yet"
            )
        return tuple(chosen)

    def kept(self, valid: Tensor, final: Tensor, places: int) -> Tensor:
        """Tokens left after each place.

        Args:
            valid: [B] long, tokens of each sample.
            final: [B] long, how many are to be left in the end, at most ``valid``.
            places: S.

        Returns:
            [S,B] long, falling along S; the last row is ``final``.
        """
        if self.shape == "geometric":
            share = (final.double() / valid.double()).pow(1.0 / places)
            steps = torch.arange(1, places + 1, device=valid.device).unsqueeze(1)
            left = (valid.double() * share.pow(steps)).round().long()
            return torch.cat([left[:-1].clamp(min=final, max=valid), final.unsqueeze(0)])
        return valid - self._removed(valid - final, places).cumsum(0)

    def _removed(self, total: Tensor, places: int) -> Tensor:
        """[S,B] long, tokens removed at each place."""
        mean = total.double() / places
        first = (mean * (1.0 - self.slope)).trunc()
        last = 2.0 * mean - first
        way = torch.linspace(0.0, 1.0, places, dtype=torch.float64, device=total.device).unsqueeze(1)
        removed = (first + (last - first) * way).trunc().long()
        rest = total - removed.sum(0)
        removed[0 if self.slope < 0 else -1] += rest
        return removed
