"""HFBackbone: what goes in, where tokens lie, frozen for certain, one record per call."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from backbone_families import make_inputs, save_family
from torch import Tensor

from qm_lightning import Tokens
from qm_lightning.backbones import HFBackbone, recording
from qm_lightning.errors import UserError
from qm_lightning.tokens import AttentionStats


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("backbones")
    names = ("bert", "llama", "roberta", "vit", "dinov2", "dinov3", "vivit", "videomae", "siglip")
    return {name: str(save_family(name, root)) for name in names}


def stats_of(tokens: Tokens) -> AttentionStats:
    assert tokens.attention is not None
    return tokens.attention


def same(ours: Tokens, theirs: Tokens) -> bool:
    return torch.equal(ours.values, theirs.values) and torch.equal(
        stats_of(ours).entropy, stats_of(theirs).entropy
    )


def test_frozen_for_certain(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["vit"])
    outer = torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert outer.training
    inputs = {"pixel_values": make_inputs("vit")["pixel_values"].requires_grad_()}
    before = copy.deepcopy(backbone.state_dict())
    tokens = backbone(inputs)
    assert not tokens.values.requires_grad
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_autocast_changes_nothing(folders: dict[str, str]) -> None:
    backbone, inputs = HFBackbone(folders["llama"]), make_inputs("llama")
    plain = backbone(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = backbone(inputs)
    assert same(plain, cast)


def test_dtype_is_that_of_the_values_and_statistics_stay_fp32(folders: dict[str, str]) -> None:
    tokens = HFBackbone(folders["vit"], dtype="bfloat16")(make_inputs("vit"))
    assert tokens.values.dtype == torch.bfloat16
    assert stats_of(tokens).entropy.dtype == torch.float32
    exact = HFBackbone(folders["vit"])(make_inputs("vit"))
    torch.testing.assert_close(stats_of(tokens).entropy, stats_of(exact).entropy, atol=0.05, rtol=0)


def test_positions_of_pictures_and_frames(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["vit"])
    pixels = make_inputs("vit")["pixel_values"]
    picture = backbone({"pixel_values": pixels})
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    assert torch.equal(picture.positions, grid.expand(2, 9, 2))
    assert picture.mask.all()
    assert picture.protected is None
    clip = backbone({"pixel_values": torch.stack([pixels, pixels.flip(0)], dim=1)})
    assert torch.equal(clip.positions[0, :, 0], torch.arange(2).repeat_interleave(9))
    assert torch.equal(clip.positions[1, :, 1:], grid.repeat(2, 1))
    torch.testing.assert_close(clip.values[:, :9], picture.values)
    torch.testing.assert_close(clip.values[:, 9:], picture.values.flip(0))
    entropy = stats_of(clip).entropy
    torch.testing.assert_close(entropy[:, :, 9:], stats_of(picture).entropy.flip(1))
    assert picture.metric is not None
    torch.testing.assert_close(clip.metric, torch.cat([picture.metric, picture.metric.flip(0)], dim=1))


@pytest.mark.parametrize(("name", "specials", "middle"), [("dinov3", 3, [1, 1]), ("vivit", 1, [1, 1, 1])])
def test_special_tokens_protected_or_dropped(
    folders: dict[str, str], name: str, specials: int, middle: list[int]
) -> None:
    inputs = make_inputs(name)
    kept = HFBackbone(folders[name], special_tokens="protect", received=True)(inputs)
    dropped = HFBackbone(folders[name], received=True)(inputs)
    assert kept.protected is not None
    assert torch.equal(kept.protected[0], torch.arange(kept.values.shape[1]) < specials)
    assert kept.positions[0, :specials].tolist() == [middle] * specials
    assert torch.equal(kept.values[:, specials:], dropped.values)
    assert torch.equal(kept.positions[:, specials:], dropped.positions)
    assert torch.equal(stats_of(kept).norm[..., specials:], stats_of(dropped).norm)


def test_special_tokens_protected_frame_by_frame(folders: dict[str, str]) -> None:
    clip = {"pixel_values": torch.randn(2, 3, 3, 24, 24)}
    tokens = HFBackbone(folders["vit"], special_tokens="protect")(clip)
    assert tokens.protected is not None
    assert torch.equal(tokens.protected[0], torch.arange(30) % 10 == 0)
    assert tokens.positions[0, ::10].tolist() == [[0, 1, 1], [1, 1, 1], [2, 1, 1]]


def test_tubelet_positions(folders: dict[str, str]) -> None:
    tokens = HFBackbone(folders["videomae"])(make_inputs("videomae"))
    assert tokens.positions[0].tolist() == [[t, r, c] for t in range(2) for r in range(3) for c in range(3)]


def test_any_size_where_the_family_allows_it(folders: dict[str, str]) -> None:
    for name in ("dinov2", "dinov3"):
        tokens = HFBackbone(folders[name])({"pixel_values": torch.randn(1, 3, 32, 40)})
        assert tokens.positions[0, -1].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dinov2", (1, 3, 30, 32), "30 x 32 pixels; expected multiples of the patch, 8 x 8"),
        ("vit", (1, 1, 32, 32), "the pictures have 1 channels; expected 3"),
        ("videomae", (1, 3, 3, 24, 24), "the clips have 3 frames; expected"),
    ],
)
def test_pictures_that_do_not_fit_are_named(
    folders: dict[str, str], name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        HFBackbone(folders[name])({"pixel_values": torch.randn(shape)})


def test_text_positions_count_real_tokens(folders: dict[str, str]) -> None:
    inputs = make_inputs("llama")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    tokens = HFBackbone(folders["llama"])({**inputs, "attention_mask": mask})
    assert tokens.positions[0, :, 0].tolist() == list(range(20))
    assert tokens.positions[1, 5:, 0].tolist() == list(range(15))
    assert tokens.values.isfinite().all()
    assert stats_of(tokens).entropy.isfinite().all()
    unmasked = HFBackbone(folders["llama"])({"input_ids": inputs["input_ids"]})
    assert torch.equal(unmasked.values[0], tokens.values[0])


def test_text_edges_are_protected(folders: dict[str, str], tmp_path: Path) -> None:
    folder = save_family("bert", tmp_path)
    added = [{"id": 5, "content": "[CLS]"}, {"id": 7, "content": "[SEP]"}, {"id": 8, "content": "[MASK]"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    inputs = {"input_ids": torch.tensor([[5, 8, 9, 7, 7]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    tokens = HFBackbone(str(folder), special_tokens="protect")(inputs)
    assert tokens.protected is not None
    assert tokens.protected[0].tolist() == [True, False, False, True, False]
    assert HFBackbone(str(folder))(inputs).protected is None


def test_layers(folders: dict[str, str]) -> None:
    inputs = make_inputs("vit")
    every = stats_of(HFBackbone(folders["vit"], layers=4)(inputs)).entropy
    chosen = HFBackbone(folders["vit"], layers=[-1, 0])
    assert chosen.layers == (0, 2)
    torch.testing.assert_close(stats_of(chosen(inputs)).entropy, every[[0, 2]])


def test_attributes(folders: dict[str, str]) -> None:
    llama, vit = HFBackbone(folders["llama"]), HFBackbone(folders["vit"])
    assert (llama.max_tokens, llama.causal, llama.attention_heads) == (40, True, 4)
    assert (vit.max_tokens, vit.causal, vit.modality) == (None, False, "image")
    assert HFBackbone(folders["roberta"]).max_tokens == 38
    assert llama.processor_config() is None
    Path(folders["vit"], "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    assert vit.processor_config() == {"image_mean": [0.1, 0.2, 0.3]}
    Path(folders["siglip"], "processor_config.json").write_text('{"image_processor": {"do_resize": true}}')
    assert HFBackbone(folders["siglip"]).processor_config() == {"do_resize": True}


def test_fingerprint_follows_the_weights(folders: dict[str, str], tmp_path: Path) -> None:
    first = HFBackbone(folders["vit"]).fingerprint()
    assert HFBackbone(folders["vit"]).fingerprint() == first
    assert len(first) == 64
    other = HFBackbone(folders["vit"])
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    assert other.fingerprint() != first
    # A pooler that the checkpoint lacks is random at every load, and no token depends on it.
    other.model.pooler = None
    other.model.save_pretrained(tmp_path)
    assert HFBackbone(str(tmp_path)).fingerprint() == HFBackbone(str(tmp_path)).fingerprint()


def test_two_backbones_in_threads_do_not_mix(folders: dict[str, str]) -> None:
    cases = [(HFBackbone(folders[name], layers=2), make_inputs(name)) for name in ("vit", "llama")]
    expected = [backbone(inputs) for backbone, inputs in cases]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(case: int) -> None:
        backbone, inputs = cases[case]
        start.wait(timeout=60)
        wrong.extend(case for _ in range(8) if not same(backbone(inputs), expected[case]))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_reentrant_calls_do_not_mix(folders: dict[str, str]) -> None:
    outer, inner = HFBackbone(folders["vit"], layers=3), HFBackbone(folders["llama"], layers=3)
    expected = outer(make_inputs("vit")), inner(make_inputs("llama"))
    nested: list[Tokens] = []
    handle = outer.model.layers[1].register_forward_pre_hook(
        lambda *_: nested.extend(
            [inner(make_inputs("llama")), HFBackbone.forward(inner, make_inputs("llama"))]
        )
    )
    again = outer(make_inputs("vit"))
    handle.remove()
    assert same(again, expected[0])
    assert len(nested) == 2
    assert all(same(tokens, expected[1]) for tokens in nested)


def test_a_copy_records_for_itself(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["vit"])
    clone = copy.deepcopy(backbone)
    del backbone
    assert stats_of(clone(make_inputs("vit"))).entropy.shape == (3, 2, 9)


def test_the_model_alone_runs_without_a_record(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["vit"], special_tokens="protect")
    inputs = make_inputs("vit")
    hidden: Tensor = backbone.model(**inputs).last_hidden_state
    assert torch.equal(hidden, backbone(inputs).values)
    assert recording._record.get() is None


def test_a_failed_call_leaves_no_record(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["vit"])
    handle = backbone.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone(make_inputs("vit"))
    handle.remove()
    assert recording._record.get() is None
    assert stats_of(backbone(make_inputs("vit"))).entropy.shape[0] == 3
