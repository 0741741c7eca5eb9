"""A merger and a prior as they come out of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.merging.placed import Block, PlacedMerger
from qm_lightning.priors import PriorOutput
from qm_lightning.tokens import MergedTokens, Tokens

if TYPE_CHECKING:
    from qm_lightning.backbones import HFBackbone


class ExportedModel(nn.Module):
    """A merger and a prior, ready for use.

    Args:
        merger: of the export.
        prior: of the export.
        config: content of config.json, for this merger.
        place: zeros before and after the coordinates of a merged token: a prior that reads several modalities has
            coordinates of its own for each.

    Attributes:
        config: names the backbone, the vocabulary, the end token, and what the run reached.
    """

    def __init__(
        self, merger: nn.Module, prior: nn.Module, config: dict[str, Any], place: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.merger, self.prior, self.config, self.place = merger, prior, config, place

    def forward(self, tokens: Tokens, targets: Tensor) -> PriorOutput:
        """Logits of the targets; arguments as in ``ARPrior``, or the text itself in streaming mode."""
        output: PriorOutput = self.prior(self.merge(tokens), targets)
        return output

    def merge(self, tokens: Tokens) -> MergedTokens:
        """What the prior reads."""
        return self.placed_merger(tokens)

    @property
    def placed_merger(self) -> PlacedMerger:
        """The merger with its output where the prior reads it; reads and encodes what a backbone is given, too."""
        merger: Any = self.merger
        return PlacedMerger(merger, Block(*self.place))

    def load_backbone(self, name_or_path: str | None = None, download: bool = False) -> HFBackbone:
        """The backbone that the model was trained behind, on the model's device.

        Args:
            name_or_path: where it lies now; ``None``: where it lay in training.
            download: fetch it by its name, over the network.

        Raises:
            UserError: it cannot be loaded, or has other weights.
        """
        from qm_lightning.backbones import HFBackbone

        stored = self.config["backbone"]
        backbone = HFBackbone(
            name_or_path or stored["name_or_path"],
            layers=list(stored["layers"]),
            received=stored["received"],
            special_tokens=stored["special_tokens"],
            dtype=stored["dtype"],
            download=download,
        )
        self.check_backbone(backbone)
        return backbone.to(next(self.prior.parameters()).device)

    def check_backbone(self, backbone: HFBackbone) -> None:
        """Refuse another backbone than that of the training.

        Raises:
            UserError: the fingerprints differ.
        """
        stored = self.config["backbone"]
        if backbone.fingerprint() != stored["fingerprint"]:
            raise UserError(
                f"the export was trained behind {stored['name_or_path']!r} and the backbone "
                f"{backbone.name_or_path!r} has other weights; expected fingerprint "
                f"{stored['fingerprint'][:12]}..., found {backbone.fingerprint()[:12]}...; pass that backbone"
            )
