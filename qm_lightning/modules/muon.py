"""Muon for the matrices of transformer blocks, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """torch's Muon and torch's AdamW behind one state, one schedule and one checkpoint.

    Lightning's automatic optimization drives one optimizer, and Muon takes matrices only. Both parts read their groups
    and their state from this one. Muon's update is scaled so that its size is AdamW's (``match_rms_adamw``), and
    its orthogonalisation runs in bfloat16: sums over ranks that differ in the last bit may differ visibly after it.

    Args:
        matrices: 2-D parameters between hidden layers.
        others: groups for AdamW.
        lr: peak rate of AdamW's groups.
        muon_lr: peak rate of the matrices.
        weight_decay: decoupled decay of the matrices.
        betas: AdamW's averages.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        muon_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._parts: tuple[Optimizer, Optimizer] = (
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=lr, betas=betas),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimizer's groups and state; the first group is Muon's."""
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, and share them again: restoring replaces both."""
        super().load_state_dict(state_dict)
        self._share()
