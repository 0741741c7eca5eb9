"""Words in the space of a picture backbone: what a merger compares tokens with when it reads the paired text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qm_lightning.errors import UserError
from qm_lightning.tokens import Tokens

FILE = "words.safetensors"


class WordVectors(nn.Module):
    """One fixed vector for each id of a text, learned by ``WordVectorsModule``.

    Args:
        folder: where that module saved them.

    Raises:
        UserError: there are none.
    """

    table: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        path = Path(folder).expanduser() / FILE
        try:
            table = load_file(path)["table"]
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"found no word vectors in {str(path)!r} ({reason}); expected those of configs/experiment/"
                "backbone_words.yaml; train them first, or leave model.context out"
            ) from None
        self.register_buffer("table", table, persistent=False)

    def forward(self, context: dict[str, Tensor]) -> Tokens:
        """The text as tokens in the pictures' space.

        Args:
            context: ``input_ids`` [B,N] long and ``attention_mask`` [B,N] (1 = real).

        Returns:
            Tokens with values [B,N,D]; positions count along the text.
        """
        ids, mask = context["input_ids"], context["attention_mask"].bool()
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).unsqueeze(-1)
        return Tokens(values=self.table[ids], mask=mask, positions=positions, ids=ids)


def save_words(table: Tensor, folder: Path) -> None:
    """Write vectors [V,D] so that ``WordVectors`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{FILE}.tmp"
    save_file({"table": table.detach().float().cpu().contiguous()}, staging)
    staging.replace(folder / FILE)
