"""One prior for several modalities, each with a frozen backbone and a merger of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qm_lightning.backbones import HFBackbone, WordVectors
from qm_lightning.errors import UserError
from qm_lightning.losses import collapse_variance
from qm_lightning.merging import Merger
from qm_lightning.merging.placed import Block, PlacedMerger
from qm_lightning.metrics import QualityMetrics
from qm_lightning.modules.compiling import CompileOptions
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.quickmerge import LossWeights, QuickMergeModule, paired_text
from qm_lightning.priors import ARPrior
from qm_lightning.tokens import MergedTokens, Tokens


@dataclass
class ModalityPath:
    """One modality's way to the prior.

    Attributes:
        backbone: frozen encoder.
        merger: ``Tokens`` -> ``MergedTokens``.
        context: puts a batch's ``context``, the paired text, into the tokens' space, for mergers that read it.
    """

    backbone: HFBackbone
    merger: Merger
    context: WordVectors | None = None


class BackboneSet(nn.ModuleDict):
    """Frozen backbones by modality; named and identified as one.

    Attributes:
        hidden_size: the sum of their widths.
    """

    def __init__(self, backbones: dict[str, HFBackbone]) -> None:
        super().__init__(backbones)
        self.hidden_size = sum(b.hidden_size for b in backbones.values())
        self.name_or_path = ", ".join(f"{name}: {b.name_or_path}" for name, b in backbones.items())
        self.layers: tuple[int, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of all weights."""
        whole = ";".join(f"{name}:{backbone.fingerprint()}" for name, backbone in self.items())  # type: ignore[operator]
        return hashlib.sha256(whole.encode()).hexdigest()


class MergerSet(nn.ModuleDict):
    """Mergers by modality, built for the width of their own backbone."""

    def require_text_given(self, given: bool, option: str = "") -> None:
        """Nothing: each of them was asked beside its own path."""

    def prepare(self, backbone: BackboneSet) -> None:
        """Nothing: each was prepared for its own backbone."""


class ModalityView(nn.Module):
    """One modality of a ``MultimodalModule`` as if there were no other: its way to the prior, and the prior."""

    def __init__(self, module: MultimodalModule, name: str) -> None:
        super().__init__()
        self.backbone: Any = module.backbone[name]
        plain: Any = module.merger[name]
        self.prior, self.merger = module.prior, PlacedMerger(plain, module.blocks[name])
        self.plain = plain
        self.merge = partial(module.merge_alone, name)
        self.train(module.training)


class MultimodalModule(QuickMergeModule):
    """Trains one AR prior on batches of several modalities, such as a ``MixtureDataModule`` gives.

    Args:
        paths: backbone and merger by modality; the names are those of the mixture's parts.
        prior: what makes an ``ARPrior`` from (input_dim, vocab_size); input_dim is the sum of the backbones' widths.
        vocab_size: size of the shared target vocabulary; the command line takes it from the data.
        eos_id: the end token; likewise.
        losses: weights of the losses.
        optimizer: the recipe.
        compile: what torch.compile compiles.

    Raises:
        UserError: no path.
    """

    backbone: BackboneSet
    merger: MergerSet  # type: ignore[assignment]

    def __init__(
        self,
        paths: dict[str, ModalityPath],
        prior: Callable[[int, int], ARPrior],
        vocab_size: int | None = None,
        eos_id: int | None = None,
        losses: LossWeights | None = None,
        optimizer: OptimizerOptions | None = None,
        compile: CompileOptions | None = None,  # noqa: A002  # the option's name: --model.compile.prior
    ) -> None:
        if not paths:
            raise UserError("found no paths; expected a backbone and a merger for each modality")
        for name, path in paths.items():
            path.merger.require_text_given(path.context is not None, f"model.paths.{name}.context")
            path.merger.prepare(path.backbone)
        super().__init__(
            BackboneSet({name: path.backbone for name, path in paths.items()}),  # type: ignore[arg-type]
            MergerSet({name: path.merger for name, path in paths.items()}),  # type: ignore[arg-type]
            prior,
            vocab_size,
            eos_id,
            losses,
            optimizer,
            compile,
        )
        self.blocks = _blocks({name: path.backbone.hidden_size for name, path in paths.items()})
        contexts: Any = {name: path.context for name, path in paths.items()}
        self.contexts = nn.ModuleDict(contexts)
        self.by_modality = nn.ModuleDict(
            {stage: nn.ModuleDict({name: QualityMetrics() for name in paths}) for stage in ("val", "test")}
        )

    def merge(self, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens]:
        """Backbone and merger of the batch's modality, in the prior's width."""
        name = self._modality(batch)
        tokens, merged = self.merge_alone(name, batch)
        return replace(tokens, values=self.blocks[name].place(tokens.values)), merged

    def merge_alone(self, name: str, batch: dict[str, Any]) -> tuple[Tokens, MergedTokens]:
        """A batch of one modality: tokens in its backbone's width, merged ones in the prior's."""
        backbone: Any = self.backbone[name]
        merger: Any = self.merger[name]
        words: Any = self.contexts[name]
        text = paired_text(words, batch, f"model.paths.{name}.context")
        placed = PlacedMerger(merger, self.blocks[name])
        tokens = replace(placed.read(backbone, batch["inputs"]), seeds=batch.get("seeds"), context=text)
        return tokens, placed.encode(backbone, batch["inputs"], tokens)

    def view(self, name: str) -> ModalityView:
        """One modality as a module of its own, sharing all weights."""
        return ModalityView(self, name)

    def _modality(self, batch: dict[str, Any]) -> str:
        name = batch.get("modality")
        if name not in self.blocks:
            raise UserError(
                f"found a batch of modality {name!r}; expected one of {', '.join(self.blocks)}; use a "
                "MixtureDataModule whose parts have the names of the model's paths"
            )
        return str(name)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, logged under its modality, the total also under ``train/loss``."""
        tokens, merged, output = self(batch)
        losses = self._losses(tokens, merged, output, batch)
        if self.logs:
            size, stage = int(batch["valid"].shape[0]), f"train/{batch['modality']}"
            named = {f"{stage}/loss/{name}": x.detach() for name, x in losses.items()}
            self.log_dict(named, batch_size=size)
            self.log("train/loss/total", losses["total"].detach(), batch_size=size)
            self.log(f"{stage}/tokens/compression", merged.compression.mean(), batch_size=size)
            self.log(f"{stage}/merged/variance", collapse_variance(merged, batch["valid"]), batch_size=size)
        return losses["total"] + self._idle(batch["modality"])

    def _idle(self, name: str) -> Tensor | float:
        """0, as a function of the mergers that this batch does not use: DDP waits for a gradient of each parameter."""
        others: Any = [merger for other, merger in self.merger.items() if other != name]
        idle = [p.sum() for merger in others for p in merger.parameters() if p.requires_grad]
        return 0.0 * torch.stack(idle).sum() if idle else 0.0

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        tokens, merged, output = self(batch)
        metrics: Any = self.by_modality[stage][batch["modality"]]  # type: ignore[index]
        metrics.update(tokens, merged, output, batch["targets"], batch["valid"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the validation metrics of the batch's modality."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the test metrics of the batch's modality."""
        self._evaluate(batch, "test")

    def _log_metrics(self, stage: str) -> None:
        """``stage/modality/name`` for each; ``stage/quality/nats`` is the mean over modalities."""
        nats = []
        by_name: Any = self.by_modality[stage]
        for name, metrics in by_name.items():
            values = metrics.compute()
            nats.append(values["quality/nats"])
            self.log_dict({f"{stage}/{name}/{key}": x for key, x in values.items()}, sync_dist=False)
            metrics.reset()
        self.log(f"{stage}/quality/nats", torch.stack(nats).mean(), sync_dist=False)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Greedy target sequences; as ``QuickMergeModule``, and the batch's ``modality``."""
        return {**super().predict_step(batch, batch_idx), "modality": batch["modality"]}


def _blocks(widths: dict[str, int]) -> dict[str, Block]:
    """Neighbouring blocks, in order."""
    whole, before, blocks = sum(widths.values()), 0, {}
    for name, width in widths.items():
        blocks[name] = Block(before, whole - before - width)
        before += width
    return blocks
