"""Checkpoints hold what is trained; the frozen backbone is named by its fingerprint."""

from __future__ import annotations

from typing import Any

from qm_lightning.errors import UserError

PREFIX = "backbone."


class FrozenBackboneMixin:
    """For a LightningModule with a frozen ``self.backbone``; put it first among the bases.

    Loading stays strict: the live frozen weights are put back before Lightning loads.
    """

    backbone: Any

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the backbone's weights, keep its fingerprint."""
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith(PREFIX)}
        checkpoint["backbone"] = {
            "name_or_path": str(self.backbone.name_or_path),
            "fingerprint": self.backbone.fingerprint(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the live frozen weights back.

        Raises:
            UserError: the checkpoint was trained behind another backbone.
        """
        stored = checkpoint.get("backbone", {})
        if stored.get("fingerprint") != self.backbone.fingerprint():
            raise UserError(
                f"the checkpoint was trained behind the backbone {stored.get('name_or_path')!r} and this one, "
                f"{str(self.backbone.name_or_path)!r}, has other weights; expected the same; "
                "pass that backbone, or train anew"
            )
        live = {PREFIX + k: v for k, v in self.backbone.state_dict().items()}
        checkpoint["state_dict"].update(live)
