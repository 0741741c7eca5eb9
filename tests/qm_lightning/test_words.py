"""Word vectors: learned from pairs alone, and what TrimTokenator makes of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qm_lightning.backbones.words import WordVectors, save_words
from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, TrimTokenator
from qm_lightning.modules import WordVectorsModule
from qm_lightning.tokens import Tokens

WIDTH, THINGS, PATCHES = 16, 6, 9


class Patches(nn.Module):
    """A backbone whose tokens are the inputs."""

    hidden_size = WIDTH

    def forward(self, inputs: dict[str, torch.Tensor], statistics: bool = True) -> Tokens:
        values = inputs["pixel_values"]
        mask = torch.ones(values.shape[:2], dtype=torch.bool)
        return Tokens(values, mask, torch.zeros(*mask.shape, 2, dtype=torch.long))


def scenes(samples: int, seed: int) -> tuple[dict[str, object], torch.Tensor]:
    """Two things per scene among noise; the text names the first, with a word (id 0) that every text has."""
    random = torch.Generator().manual_seed(seed)
    looks = torch.randn(THINGS, WIDTH, generator=torch.Generator().manual_seed(99))
    values = 0.5 * torch.randn(samples, PATCHES, WIDTH, generator=random)
    things = torch.stack([torch.randperm(THINGS, generator=random)[:2] for _ in range(samples)])
    places = torch.stack([torch.randperm(PATCHES, generator=random)[:2] for _ in range(samples)])
    for k in range(2):
        values[torch.arange(samples), places[:, k]] += looks[things[:, k]]
    ids = torch.stack([torch.zeros(samples, dtype=torch.long), 1 + things[:, 0]], dim=1)
    batch = {
        "inputs": {"pixel_values": values},
        "context": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "valid": torch.ones(samples, dtype=torch.bool),
    }
    return batch, places[:, 0]


def test_words_find_what_they_name_and_trim_tokenator_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = WordVectorsModule(Patches(), str(tmp_path), words=THINGS + 1)  # type: ignore[arg-type]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]  # no trainer here
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for step in range(200):
        optimizer.zero_grad()
        module.training_step(scenes(64, step)[0], step).backward()
        optimizer.step()
    save_words(module.table, module.output_dir)

    batch, place = scenes(200, 1000)
    context: dict[str, torch.Tensor] = batch["context"]  # type: ignore[assignment]
    words = WordVectors(str(tmp_path))(context)
    assert words.values.shape == (200, 2, WIDTH)
    best = module.likeness(batch)[torch.arange(200), :, context["input_ids"][:, 1]].argmax(1)
    assert (best == place).float().mean() > 0.9  # by chance 1 of 9
    tokens = Patches()(batch["inputs"])  # type: ignore[arg-type]
    trim = TrimTokenator(FixedBudget(PATCHES / 2), first_share=0.25, normalize=True)
    alone = trim(tokens).assignment.gather(1, place[:, None]) >= 0
    asked = trim(Tokens(tokens.values, tokens.mask, tokens.positions, context=words)).assignment
    asked = asked.gather(1, place[:, None]) >= 0
    assert asked.float().mean() > 0.85
    assert asked.float().mean() > alone.float().mean() + 0.2


def test_missing_words_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no word vectors in .*backbone_words.yaml"):
        WordVectors(str(tmp_path))
    module = WordVectorsModule(Patches(), str(tmp_path))  # type: ignore[arg-type]
    batch = scenes(2, 0)[0]
    del batch["context"]
    with pytest.raises(UserError, match="no context"):
        module.training_step(batch, 0)
