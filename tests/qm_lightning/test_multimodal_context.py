"""The question about a picture reaches the merger of its part in a module of several modalities."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qm_lightning.backbones import HFBackbone, InBackbone, WordVectors
from qm_lightning.backbones.small import preprocessing_of, save_backbone, small_vit
from qm_lightning.backbones.words import save_words
from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, QuickMerge, ToMe, TrimTokenator
from qm_lightning.modules import MultimodalModule
from qm_lightning.modules.multimodal import ModalityPath
from qm_lightning.priors import ARPrior

WIDTH, PICTURES, WORDS = 32, 3, 5


@pytest.fixture
def module(tmp_path: Path) -> MultimodalModule:
    """Two parts behind one backbone: ``asked`` reads the question, ``plain`` does not."""
    torch.manual_seed(0)
    vit = small_vit(width=WIDTH, depth=1, heads=2)
    save_backbone(vit, tmp_path / "vit", preprocessing_of(vit))
    save_words(torch.randn(WORDS, WIDTH), tmp_path / "words")

    def path(context: WordVectors | None) -> ModalityPath:
        merger = TrimTokenator(FixedBudget(8.0), first_share=0.25, normalize=True)
        return ModalityPath(HFBackbone(str(tmp_path / "vit"), layers=1), merger, context)

    paths = {"asked": path(WordVectors(str(tmp_path / "words"))), "plain": path(None)}
    return MultimodalModule(
        paths, lambda width, words: ARPrior(width, words, dim=16, depth=1, heads=2), vocab_size=11, eos_id=10
    ).eval()


def batch(modality: str, word: int) -> dict[str, Any]:
    pixels = torch.rand(PICTURES, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.full((PICTURES, 1), word)
    return {
        "modality": modality,
        "inputs": {"pixel_values": pixels},
        "context": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }


def test_another_question_keeps_other_tokens_of_its_own_part_only(module: MultimodalModule) -> None:
    def kept(modality: str, word: int) -> list[list[bool]]:
        found: list[list[bool]] = (module.merge(batch(modality, word))[1].assignment >= 0).tolist()
        return found

    assert kept("asked", 0) != kept("asked", 1)
    assert kept("plain", 0) == kept("plain", 1)
    assert (module.view("asked").merge(batch("asked", 1))[1].assignment >= 0).tolist() == kept("asked", 1)
    assert not [name for name in module.state_dict() if "context" in name]


def test_a_batch_without_the_question_is_named(module: MultimodalModule) -> None:
    silent = {k: v for k, v in batch("asked", 0).items() if k != "context"}
    with pytest.raises(UserError, match=r"model.paths.asked.context is set but the batch has no context"):
        module.merge(silent)


def test_every_parameter_gets_a_gradient_whichever_part_a_batch_is_of(tmp_path: Path) -> None:
    """As DDP asks: a rank that computes no gradient for one would be waited for."""
    vit = small_vit(width=WIDTH, depth=1, heads=2)
    save_backbone(vit, tmp_path / "vit", preprocessing_of(vit))
    paths = {
        name: ModalityPath(HFBackbone(str(tmp_path / "vit"), layers=1), QuickMerge(learn_weights=True))
        for name in ("one", "other")
    }
    module = MultimodalModule(
        paths, lambda width, words: ARPrior(width, words, dim=16, depth=1, heads=2), vocab_size=11, eos_id=10
    )
    ones = {
        "targets": torch.ones(PICTURES, 2, dtype=torch.long),
        "valid": torch.ones(PICTURES, dtype=torch.bool),
    }
    for name, idle in (("one", "other"), ("other", "one")):
        module.zero_grad()
        module.training_step({**batch(name, 0), **ones}, 0).backward()
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        assert [n for n, p in trained if p.grad is None] == []
        moved = {
            part: sum(float(p.grad.abs().sum()) for n, p in trained if n.startswith(f"merger.{part}."))
            for part in paths
        }  # type: ignore[union-attr]
        assert moved[name] > 0.0
        assert moved[idle] == 0.0


def test_one_part_may_merge_between_the_layers_of_its_backbone(tmp_path: Path) -> None:
    vit = small_vit(width=WIDTH, depth=3, heads=2)
    save_backbone(vit, tmp_path / "vit", preprocessing_of(vit))

    def backbone() -> HFBackbone:
        return HFBackbone(str(tmp_path / "vit"), layers=1)

    paths = {
        "inside": ModalityPath(backbone(), InBackbone(ToMe(FixedBudget(4.0)))),
        "behind": ModalityPath(backbone(), ToMe(FixedBudget(4.0))),
    }
    module = MultimodalModule(
        paths, lambda width, words: ARPrior(width, words, dim=16, depth=1, heads=2), vocab_size=11, eos_id=10
    ).eval()
    for place, name in enumerate(paths):
        tokens, merged = module.merge(batch(name, 0))
        assert merged.mask.sum(1).tolist() == [16] * PICTURES
        assert tokens.mask.sum(1).tolist() == [64] * PICTURES
        own = merged.values[..., WIDTH * place : WIDTH * (place + 1)]
        assert own.count_nonzero() > 0
        assert merged.values.count_nonzero() == own.count_nonzero()  # the other part's coordinates stay empty
        assert module.view(name).merge(batch(name, 0))[1].values.equal(merged.values)
