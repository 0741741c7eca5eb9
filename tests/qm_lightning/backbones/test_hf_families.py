"""Every family of the spec: statistics against the eager model's own attention, values against plain SDPA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from backbone_families import FAMILIES, make_inputs, save_family
from torch import Tensor

from qm_lightning.backbones import HFBackbone

TEXT_FAMILIES = [name for name, family in FAMILIES.items() if family.modality == "text"]
CASES = [(name, False) for name in FAMILIES] + [(name, True) for name in TEXT_FAMILIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root) for name in FAMILIES}


def plain(folder: Path, implementation: str, inputs: dict[str, Tensor]) -> Any:
    """The model without this project: transformers alone."""
    model = hf.AutoModel.from_pretrained(
        folder, attn_implementation=implementation, dtype=torch.float32
    ).eval()
    if hasattr(model, "vision_model"):
        model = model.vision_model
    elif folder.name == "t5":
        model = model.get_encoder()
    with torch.no_grad():
        return model(**inputs, output_attentions=implementation == "eager")


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_statistics_are_those_of_the_eager_model(name: str, padded: bool, folders: dict[str, Path]) -> None:
    inputs = make_inputs(name, padded)
    tokens = HFBackbone(str(folders[name]), layers=3, received=True)(inputs)
    matrices = torch.stack(plain(folders[name], "eager", inputs).attentions).double()  # [L,B,heads,S,S]
    valid = inputs.get("attention_mask", torch.ones(matrices.shape[1], matrices.shape[-1])).bool()
    entropy = torch.special.entr(matrices).sum(-1)
    count = (matrices > 0).sum(-1)
    entropy = torch.where(count > 1, entropy / count.clamp(min=2).double().log(), 0.0).mean(2) * valid
    received = (matrices.mean(2) * valid[None, :, :, None]).sum(2)
    skip = FAMILIES[name].specials
    assert tokens.attention is not None
    assert tokens.attention.received is not None
    torch.testing.assert_close(tokens.attention.entropy.double(), entropy[..., skip:], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.attention.received.double(), received[..., skip:], atol=2e-5, rtol=0)
    assert entropy[..., skip:][:, valid[:, skip:]].std() > 1e-3  # else a constant would pass


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_values_are_those_of_plain_sdpa(name: str, padded: bool, folders: dict[str, Path]) -> None:
    inputs = make_inputs(name, padded)
    backbone = HFBackbone(str(folders[name]), layers=2)
    tokens = backbone(inputs)
    expected = plain(folders[name], "sdpa", inputs).last_hidden_state[:, FAMILIES[name].specials :]
    if not padded:
        assert torch.equal(tokens.values, expected)
    torch.testing.assert_close(tokens.values[tokens.mask], expected[tokens.mask], atol=1e-5, rtol=1e-5)
    assert backbone.layers == (0, 2)
    assert backbone.causal is FAMILIES[name].causal
    assert backbone.modality == FAMILIES[name].modality
    assert tokens.values.shape[-1] == backbone.hidden_size == 32
    assert tokens.metric is not None
    assert tokens.metric.shape[:2] == tokens.values.shape[:2] == tokens.positions.shape[:2]
    assert tokens.metric.shape[2] == (16 if name == "qwen3" else 8)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_padding_changes_nothing(name: str, folders: dict[str, Path]) -> None:
    backbone = HFBackbone(str(folders[name]), layers=3, received=True, dtype="float64")
    padded = make_inputs(name, padded=True)
    alone = {key: value[1:, :13] for key, value in padded.items()}
    long, short = backbone(padded), backbone(alone)
    torch.testing.assert_close(long.values[1:, :13], short.values, atol=1e-10, rtol=1e-10)
    assert long.attention is not None
    assert short.attention is not None
    for ours, theirs in (
        (long.attention.entropy, short.attention.entropy),
        (long.attention.norm, short.attention.norm),
        (long.attention.received, short.attention.received),
    ):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours[:, 1:, :13], theirs, atol=1e-10, rtol=1e-10)
        assert (ours[:, 1, 13:] == 0).all()
    assert torch.equal(long.mask[1], torch.arange(20) < 13)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_padding_may_stand_before_the_text(name: str, folders: dict[str, Path]) -> None:
    backbone = HFBackbone(str(folders[name]), layers=3, received=True, dtype="float64")
    behind = make_inputs(name, padded=True)
    before = {key: torch.stack([rows[0], rows[1].roll(7)]) for key, rows in behind.items()}
    expected, found = backbone(behind), backbone(before)
    torch.testing.assert_close(found.values[1, 7:], expected.values[1, :13], atol=1e-10, rtol=1e-10)
    assert found.attention is not None
    assert expected.attention is not None
    torch.testing.assert_close(
        found.attention.entropy[:, 1, 7:], expected.attention.entropy[:, 1, :13], atol=1e-10, rtol=1e-10
    )
    assert found.positions[1, 7:, 0].tolist() == list(range(13))


def test_norm_is_that_of_what_enters_the_output_projection(folders: dict[str, Path]) -> None:
    backbone = HFBackbone(str(folders["llama"]), layers=[1])
    entering: list[Tensor] = []
    projection = backbone.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    tokens = backbone(make_inputs("llama"))
    assert tokens.attention is not None
    torch.testing.assert_close(tokens.attention.norm[0], entering[0].norm(dim=-1))


def test_metric_is_the_mean_key_of_the_last_chosen_layer(folders: dict[str, Path]) -> None:
    backbone = HFBackbone(str(folders["vit"]), layers=[0, 1])
    keys: list[Tensor] = []
    layer = backbone.model.layers[1].attention
    layer.k_proj.register_forward_hook(lambda *call: keys.append(call[-1]))
    tokens = backbone(make_inputs("vit"))
    torch.testing.assert_close(tokens.metric, keys[0].unflatten(-1, (4, 8)).mean(2)[:, 1:])


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_tokens_without_statistics_are_the_same_tokens(
    name: str, padded: bool, folders: dict[str, Path]
) -> None:
    inputs = make_inputs(name, padded)
    backbone = HFBackbone(str(folders[name]), layers=3)
    seen, bare = backbone(inputs), backbone(inputs, statistics=False)
    real = seen.mask
    assert bare.attention is None
    assert torch.equal(bare.mask, real)
    assert torch.equal(bare.positions, seen.positions)
    torch.testing.assert_close(bare.values[real], seen.values[real], atol=1e-5, rtol=1e-4)
    assert bare.metric is not None
    assert seen.metric is not None
    torch.testing.assert_close(bare.metric[real], seen.metric[real], atol=1e-5, rtol=1e-4)
