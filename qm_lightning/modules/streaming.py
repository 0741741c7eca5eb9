"""Streaming mode: the text is merged while it is read, and every token of it is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.incremental import growing_encoder
from qm_lightning.errors import UserError
from qm_lightning.merging import Merger
from qm_lightning.modules.compiling import CompileOptions
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.quickmerge import LossWeights, QuickMergeModule
from qm_lightning.priors import PriorOutput, StreamingPrior, check_streaming, streaming_targets
from qm_lightning.tokens import MergedTokens, Tokens


class StreamingModule(QuickMergeModule):
    """Trains a streaming merger and a ``StreamingPrior`` behind a frozen causal backbone.

    The targets are the text itself, so ``quality/nats`` is the exact negative log-likelihood of a token, and
    ``quality/bits`` bits per byte where tokens are bytes (generative.md, section 6). A text's first token is
    counted; no end token is, since passages end anywhere.

    Args:
        backbone: frozen causal text model.
        merger: of class "streaming".
        prior: a ``StreamingPrior``, or what makes one from (input_dim, vocab_size).
        vocab_size: of the text's tokens; the command line takes it from the data.
        eos_id: the end token; likewise.
        fidelity: weight of the fidelity constraint.
        gamma: share of the norm that must survive merging; the constraint is idle above it.
        optimizer: the recipe.
        compile: what torch.compile compiles.
        predict_tokens: tokens that ``predict`` writes after each text.

    Raises:
        UserError: a merger or a backbone that looks ahead.
    """

    prior: StreamingPrior  # type: ignore[assignment]  # in the place of the conditioning prior

    def __init__(
        self,
        backbone: HFBackbone,
        merger: Merger,
        prior: Callable[[int, int], StreamingPrior],
        vocab_size: int | None = None,
        eos_id: int | None = None,
        fidelity: float = 0.1,
        gamma: float = 0.8,
        optimizer: OptimizerOptions | None = None,
        compile: CompileOptions | None = None,  # noqa: A002  # the option's name: --model.compile.prior
        predict_tokens: int = 64,
    ) -> None:
        check_streaming(type(merger).__name__, merger.causality, backbone.causal)
        super().__init__(
            backbone,
            merger,
            prior,  # type: ignore[arg-type]
            vocab_size,
            eos_id,
            LossWeights(align=0.0, fidelity=fidelity, gamma=gamma),
            optimizer,
            compile,
        )
        self.predict_tokens = predict_tokens

    def forward(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens, PriorOutput]:
        """The whole path for one batch, whose targets are the text itself."""
        check_targets(batch)
        return super().forward(batch)

    def _losses(
        self, tokens: Tokens, merged: MergedTokens, output: PriorOutput, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        losses = super()._losses(tokens, merged, output, batch)
        return {name: loss for name, loss in losses.items() if name not in ("forward", "backward")}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Greedy continuations of the texts.

        Returns:
            ``keys`` (list of B sample keys), ``position`` [B] long and ``sequences`` [B,<=predict_tokens] long.
        """
        inputs = batch["inputs"]
        sequences = self.prior.generate(
            growing_encoder(self.backbone, self.merger),
            inputs["input_ids"],
            inputs["attention_mask"].bool(),
            self.predict_tokens,
            temperature=0.0,
            eos_id=self.eos_id,
        )
        return {"keys": batch["keys"], "position": batch["position"], "sequences": sequences}


def check_targets(batch: dict[str, Any]) -> None:
    """Refuse targets that are not the text. Their values are compared on the CPU only, where it stalls nothing.

    Raises:
        UserError: they are something else, or the batch holds no text.
    """
    ids, targets = batch["inputs"].get("input_ids"), batch["targets"]
    if ids is not None and ids.shape == targets.shape:
        if targets.device.type != "cpu":
            return
        if torch.equal(targets, streaming_targets(ids, batch["inputs"]["attention_mask"])):
            return
    raise UserError(
        "the streaming mode predicts the text itself and found other targets; expected those of "
        "TextDataModule with targets=text; set --data.targets text"
    )
