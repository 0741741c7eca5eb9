"""The main path: batch -> frozen backbone -> Tokens -> merger -> MergedTokens -> AR prior -> losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from qm_lightning.backbones import HFBackbone, WordVectors
from qm_lightning.callbacks.loop_state import logs_now
from qm_lightning.errors import UserError
from qm_lightning.losses import alignment_losses, collapse_variance, fidelity_loss, global_mean, target_loss
from qm_lightning.merging import Merger
from qm_lightning.metrics import QualityMetrics
from qm_lightning.modules.compiling import CompileOptions, call_in_buckets, compile_in_place
from qm_lightning.modules.optim import OptimizerOptions, build_optimizer
from qm_lightning.priors import ARPrior, PriorOutput
from qm_lightning.runtime.frozen import FrozenBackboneMixin
from qm_lightning.runtime.sharded import shard_trainable
from qm_lightning.tokens import MergedTokens, Tokens


@dataclass
class LossWeights:
    """``L = L_targets + align (L_forward + L_backward) + fidelity L_fidelity + merger's own``.

    Attributes:
        align: weight of predicting the next (and the previous) merged token.
        fidelity: weight of the fidelity constraint.
        gamma: share of the norm that must survive merging; the constraint is idle above it.
    """

    align: float = 0.1
    fidelity: float = 0.1
    gamma: float = 0.8


def paired_text(
    words: WordVectors | None, batch: dict[str, Any], option: str = "model.context"
) -> Tokens | None:
    """The batch's ``context`` in the space of its tokens, for mergers that read it.

    Args:
        words: puts it there; ``None``: no merger reads it.
        batch: as docs/architecture.md has it.
        option: the user's name of ``words``.

    Raises:
        UserError: there is no context.
    """
    if words is None:
        return None
    if "context" not in batch:
        raise UserError(
            f"{option} is set but the batch has no context; expected a paired text, such as a question; use a "
            f"PairedDataModule over shards with question.txt, or leave {option} out"
        )
    return words(batch["context"])  # type: ignore[no-any-return]


def predicted(batch: dict[str, Any], sequences: Tensor) -> dict[str, Any]:
    """What ``predict_step`` returns: ``sequences`` beside what says whose they are and what they are to be."""
    return {**{name: batch[name] for name in ("keys", "position", "targets")}, "sequences": sequences}


class QuickMergeModule(FrozenBackboneMixin, LightningModule):
    """Trains a merger and an AR prior behind a frozen backbone.

    Args:
        backbone: frozen encoder, batch inputs -> ``Tokens``.
        merger: ``Tokens`` -> ``MergedTokens``.
        prior: an ``ARPrior``, or what makes one from (input_dim, vocab_size).
        vocab_size: size of the target vocabulary, end token included; the command line takes it from the data.
        eos_id: the end token; likewise.
        losses: weights of the losses.
        optimizer: the recipe.
        compile: what torch.compile compiles; nothing by default.
        context: puts a batch's ``context``, the paired text, into the tokens' space, for mergers that read it.
    """

    def __init__(
        self,
        backbone: HFBackbone,
        merger: Merger,
        prior: Callable[[int, int], ARPrior],
        vocab_size: int | None = None,
        eos_id: int | None = None,
        losses: LossWeights | None = None,
        optimizer: OptimizerOptions | None = None,
        compile: CompileOptions | None = None,  # noqa: A002  # the option's name: --model.compile.prior
        context: WordVectors | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.context = context
        self.merger = merger
        self.merger.require_text_given(context is not None)
        self.merger.prepare(backbone)
        if not isinstance(prior, nn.Module):
            if vocab_size is None:
                raise ValueError("vocab_size is needed to build the prior; or pass an ARPrior")
            prior = prior(backbone.hidden_size, vocab_size)
        self.prior: ARPrior = prior  # type: ignore[assignment]  # an ARPrior was passed, or has just been made
        self.eos_id = eos_id
        self.weights = losses or LossWeights()
        self.options = optimizer or OptimizerOptions()
        self.compiling = compile or CompileOptions()
        compile_in_place(self.prior, self.merger, self.compiling)
        self.val_metrics = QualityMetrics()
        self.test_metrics = QualityMetrics()

    def merge(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens]:
        """Backbone and merger: what the prior reads, and what it was made from."""
        tokens = replace(
            self.merger.read(self.backbone, batch["inputs"]),
            seeds=batch.get("seeds"),
            context=paired_text(self.context, batch),
        )
        return tokens, self.merger.encode(self.backbone, batch["inputs"], tokens)

    def forward(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens, PriorOutput]:
        """The whole path for one batch (docs/architecture.md lists its keys)."""
        tokens, merged = self.merge(batch)
        return tokens, *call_in_buckets(self.prior, merged, batch["targets"], self.compiling)

    def _losses(
        self, tokens: Tokens, merged: MergedTokens, output: PriorOutput, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        valid = batch["valid"]
        forward, backward = alignment_losses(output, merged, valid)
        losses = {
            "target": global_mean(*target_loss(output.logits, batch["targets"], valid)),
            "forward": global_mean(*forward),
            "backward": global_mean(*backward),
            "fidelity": global_mean(*fidelity_loss(tokens, merged, self.weights.gamma, valid)),
            **merged.losses,
        }
        own = sum(merged.losses.values(), torch.zeros_like(losses["target"]))
        losses["total"] = (
            losses["target"]
            + self.weights.align * (losses["forward"] + losses["backward"])
            + self.weights.fidelity * losses["fidelity"]
            + own
        )
        return losses

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, with its parts logged."""
        tokens, merged, output = self(batch)
        losses = self._losses(tokens, merged, output, batch)
        if self.logs:
            size = int(batch["valid"].shape[0])
            named = {f"train/loss/{name}": loss.detach() for name, loss in losses.items()}
            self.log_dict(named, batch_size=size)
            self.log("train/tokens/compression", merged.compression.mean(), prog_bar=True, batch_size=size)
            self.log("train/merged/variance", collapse_variance(merged, batch["valid"]), batch_size=size)
        return losses["total"]

    @property
    def logs(self) -> bool:
        """Whether the training step's figures go to the loggers; making them at every step costs time."""
        return self._trainer is not None and logs_now(self._trainer)

    def _metrics(self, stage: str) -> QualityMetrics:
        return self.val_metrics if stage == "val" else self.test_metrics

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        tokens, merged, output = self(batch)
        self._metrics(stage).update(tokens, merged, output, batch["targets"], batch["valid"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test")

    def _log_metrics(self, stage: str) -> None:
        metrics = self._metrics(stage)
        self.log_dict(
            {f"{stage}/{name}": value for name, value in metrics.compute().items()}, sync_dist=False
        )
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, reduced over ranks by torchmetrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Greedy target sequences.

        Returns:
            ``keys`` (list of B sample keys), ``position`` [B] long (order of the epoch, -1 = padding),
            ``sequences`` [B,<=T] long, and the ``targets`` [B,T] that they are to be.
        """
        _, merged = self.merge(batch)
        sequences = self.prior.generate(
            merged, max_new_tokens=batch["targets"].shape[1], temperature=0.0, eos_id=self.eos_id
        )
        return predicted(batch, sequences)

    def configure_model(self) -> None:
        """Under ``strategy: fsdp2``, shard what is trained over the processes; else nothing."""
        shard_trainable(self)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warm-up and cosine over ``trainer.max_steps``; the backbone is frozen and left out."""
        return build_optimizer(self.named_parameters(), self.options, self.trainer.max_steps)
