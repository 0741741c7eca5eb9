"""NXTP: recognition as next-token prediction, on a prefix that a merger has shortened (docs/nxtp.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qm_lightning.backbones import HFBackbone
from qm_lightning.errors import UserError
from qm_lightning.merging import Merger
from qm_lightning.metrics.encoders import StringEncoder
from qm_lightning.metrics.labels import LabelScores
from qm_lightning.modules.optim import OptimizerOptions
from qm_lightning.modules.quickmerge import LossWeights, QuickMergeModule, predicted
from qm_lightning.priors import LabelPrior, PriorOutput, keep_first_blocks, one_shot, scored_labels
from qm_lightning.runtime.checkpoint_io import read_checkpoint
from qm_lightning.tokens import MergedTokens, Tokens

_PRIOR = "prior."
# One target per label stands at the anchor, so the likeliest token there can be right for one label only.
_MEANINGLESS = ("quality/exact", "quality/top1")


@dataclass
class LabelDecoding:
    """How labels are read out of the prior.

    Attributes:
        top_k: branches of one-shot sampling, and labels that count.
        max_tokens: longest label, separator included.
        branch_tokens: tokens at which branches may still split; 1 is the paper's method.
        min_score: labels of a smaller probability are not predicted.
        min_ratio: labels less likely than this share of the likeliest are not predicted.
    """

    top_k: int = 10
    max_tokens: int = 20
    branch_tokens: int = 1
    min_score: float = 0.0
    min_ratio: float = 0.0


class NXTPModule(QuickMergeModule):
    """Trains a ``LabelPrior`` on label sets, and reads labels out of it in one shot.

    Args:
        backbone: frozen encoder.
        merger: shortens the prefix.
        prior: a ``LabelPrior``, or what makes one from (input_dim, vocab_size).
        vocab_size: size of the target vocabulary; the command line takes it from the data.
        eos_id: the token that closes a label; likewise.
        losses: weights of the losses; there is no alignment.
        optimizer: the recipe.
        decoding: of one-shot sampling.
        encoder: compares predicted labels with the true ones; ``None``: equal or not.
        start_from: checkpoint of a run with the same prior and as many blocks or more: its weights are the
            start, and blocks that this prior does not have are dropped (a truncated decoder).

    Raises:
        UserError: the prior writes no labels, or does not fit ``start_from``.
    """

    def __init__(
        self,
        backbone: HFBackbone,
        merger: Merger,
        prior: Callable[[int, int], LabelPrior],
        vocab_size: int | None = None,
        eos_id: int | None = None,
        losses: LossWeights | None = None,
        optimizer: OptimizerOptions | None = None,
        decoding: LabelDecoding | None = None,
        encoder: StringEncoder | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__(backbone, merger, prior, vocab_size, eos_id, losses, optimizer)
        if not isinstance(self.prior, LabelPrior):
            raise UserError(
                f"NXTPModule got a {type(self.prior).__name__}; expected a LabelPrior; set model.prior to "
                "qm_lightning.priors.LabelPrior"
            )
        self.decoding = decoding or LabelDecoding()
        self.scores = LabelScores(encoder, self.decoding.top_k)
        self.start_from = start_from

    @property
    def labels(self) -> LabelPrior:
        """The prior; a second attribute would put its weights into checkpoints twice."""
        return cast(LabelPrior, self.prior)

    def setup(self, stage: str) -> None:
        """See that the data gives label sets, and take the weights to start from; a checkpoint that is resumed follows.

        Raises:
            UserError: its targets are one text per sample, or are separated by another token.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and not getattr(data, "label_sets", True):
            raise UserError(
                "the data's targets are one sequence per sample; NXTP expects label sets; set data.targets to "
                "digit_labels, word_labels or text_labels"
            )
        if self.eos_id is not None and self.eos_id != self.labels.sep_id:
            raise UserError(
                f"the data closes labels with token {self.eos_id} and the prior with {self.labels.sep_id}; "
                "expected the same; leave prior.sep_id out"
            )
        if stage == "fit" and self.start_from is not None:
            weights = read_checkpoint(self.start_from)["state_dict"]
            state = {k.removeprefix(_PRIOR): v for k, v in weights.items() if k.startswith(_PRIOR)}
            self.prior.load_state_dict(keep_first_blocks(state, self.prior))

    def _losses(
        self, tokens: Tokens, merged: MergedTokens, output: PriorOutput, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        return super()._losses(
            tokens, merged, output, {**batch, "targets": self.labels.learnt(batch["targets"])}
        )

    def read_labels(self, merged: MergedTokens) -> list[list[tuple[str, float]]]:
        """Labels of each sample and their probabilities, the likeliest first."""
        options = self.decoding
        branches = one_shot(self.labels, merged, options.top_k, options.max_tokens, options.branch_tokens)
        return scored_labels(branches, self.labels.sep_id, self._decode, options.min_score, options.min_ratio)

    def _decode(self, ids: Tensor) -> str:
        data: Any = getattr(self._trainer, "datamodule", None)
        return " ".join(map(str, ids.tolist())) if data is None else data.decode_targets(ids)

    def true_labels(self, targets: Tensor) -> list[list[str]]:
        """Label strings of targets [B,T]."""
        rows: list[list[str]] = []
        for row in targets.cpu():
            kept = row[row != -100]
            ends = (kept == self.labels.sep_id).nonzero().flatten().tolist()
            starts = [0, *(end + 1 for end in ends[:-1])]
            rows.append([self._decode(kept[a:b]).strip() for a, b in zip(starts, ends, strict=True)])
        return rows

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        tokens, merged, output = self(batch)
        targets = self.labels.learnt(batch["targets"])
        self._metrics(stage).update(tokens, merged, output, targets, batch["valid"])
        found = [[label for label, _ in row] for row in self.read_labels(merged)]
        wanted = self.true_labels(batch["targets"])
        real = [i for i, valid in enumerate(batch["valid"].tolist()) if valid]
        self.scores.update([found[i] for i in real], [wanted[i] for i in real])

    def _log_metrics(self, stage: str) -> None:
        metrics = self._metrics(stage)
        values = {k: v for k, v in metrics.compute().items() if k not in _MEANINGLESS}
        values |= {f"labels/{name}": value for name, value in self.scores.compute().items()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=False)
        metrics.reset()
        self.scores.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Label tokens, the likeliest label first.

        Returns:
            ``keys``, ``position`` [B] long as ever, and ``sequences`` [B,T] long: each label's tokens and the
            separator, -100 = padding. ``targets`` [B,T] are the true ones.
        """
        _, merged = self.merge(batch)
        options = self.decoding
        found = one_shot(self.labels, merged, options.top_k, options.max_tokens, options.branch_tokens)
        labels = found.finished & (found.tokens[..., 0] != self.labels.sep_id)
        scores = found.scores.exp().masked_fill(~labels, 0.0)
        limit = (options.min_ratio * scores.amax(dim=1, keepdim=True)).clamp(min=options.min_score)
        keep = labels & (scores >= limit)
        ranked = found.scores.argsort(dim=1, descending=True)
        rows = []
        for tokens, kept, order in zip(found.tokens, keep, ranked, strict=True):
            strands = [tokens[r] for r in order.tolist() if bool(kept[r])]
            written = [
                torch.cat([s[s != self.labels.sep_id], s.new_tensor([self.labels.sep_id])]) for s in strands
            ]
            rows.append(torch.cat(written) if written else tokens.new_empty(0))
        sequences = pad_sequence(rows, batch_first=True, padding_value=-100)
        return predicted(batch, sequences)
