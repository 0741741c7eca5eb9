"""Every mistake ends in one line that says what was found, what was expected and how to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from backbone_families import GROUPED, PICTURE, TEXT, make_inputs, save_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from qm_lightning.backbones import HFBackbone
from qm_lightning.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("errors")
    return {n: str(save_family(n, root)) for n in ("bert", "llama", "roberta", "vit", "dinov2", "videomae")}


def refused(*words: str) -> Any:
    """Expect a UserError of one line that has all words."""

    def check(error: BaseException) -> bool:
        text = str(error)
        return "\n" not in text and "expected" in text and all(word in text for word in words)

    return pytest.RaisesExc(UserError, check=check)


PIXELS = torch.zeros(1, 3, 24, 24)
LONG = torch.zeros(1, 41, dtype=torch.long)
BAD_INPUTS: list[tuple[str, dict[str, Tensor], tuple[str, ...]]] = [
    ("vit", {"input_ids": LONG}, ("input_ids", "image", "pixel_values")),
    ("bert", {"pixel_values": PIXELS}, ("pixel_values", "text", "input_ids")),
    ("videomae", {"pixel_values": PIXELS}, ("[1, 3, 24, 24]", "[B,F,C,H,W]", "video")),
    ("vit", {"pixel_values": torch.zeros(1, 3, 25, 24)}, ("25 x 24", "multiples", "8 x 8")),
    ("dinov2", {"pixel_values": torch.zeros(1, 3, 30, 24)}, ("30 x 24", "multiples")),
    ("vit", {"pixel_values": torch.zeros(1, 3, 32, 32)}, ("32 x 32", "24 x 24", "vit")),
    ("vit", {"pixel_values": torch.zeros(1, 1, 24, 24)}, ("1 channels", "expected 3")),
    ("vit", {"pixel_values": torch.zeros(1, 3, 24, 24, dtype=torch.uint8)}, ("uint8", "float")),
    ("vit", {"pixel_values": torch.zeros(3, 24, 24)}, ("[3, 24, 24]",)),
    ("videomae", {"pixel_values": torch.zeros(1, 6, 3, 24, 24)}, ("6 frames", "expected 4")),
    ("bert", {"input_ids": LONG}, ("41 tokens", "at most 40")),
    ("llama", {"input_ids": LONG}, ("41 tokens", "at most 40")),
    ("roberta", {"input_ids": LONG[:, :39]}, ("39 tokens", "at most 38")),
    ("llama", {"input_ids": torch.tensor([[1, 60]])}, ("token id 60", "under 60", "tokenizer")),
]


@pytest.mark.parametrize(("name", "inputs", "words"), BAD_INPUTS)
def test_inputs(
    folders: dict[str, str], name: str, inputs: dict[str, Tensor], words: tuple[str, ...]
) -> None:
    with refused(*words):
        HFBackbone(folders[name])(inputs)


@pytest.mark.parametrize("layers", [0, -1, [], [3], [-4], [0, 99]])
def test_layers_that_the_model_does_not_have(folders: dict[str, str], layers: int | list[int]) -> None:
    with refused("3 layers", str(layers)):
        HFBackbone(folders["vit"], layers=layers)


def test_options(folders: dict[str, str]) -> None:
    for dtype in ("float31", "int64", "nn"):
        with refused(dtype, "float32"):
            HFBackbone(folders["vit"], dtype=dtype)
    with refused("keep", "drop", "protect"):
        HFBackbone(folders["vit"], special_tokens="keep")  # type: ignore[arg-type]


def test_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "runs/a/backbone", "~/nowhere-at-all"):
        with refused("does not exist", name):
            HFBackbone(name)
    with refused("no config.json"):
        HFBackbone(str(tmp_path))


def test_no_network_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.setattr("socket.getaddrinfo", forbidden)
    with refused("nobody/nothing", "download=true"):
        HFBackbone("nobody/nothing")


def test_a_shipped_backbone_that_was_not_trained_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "configs/experiment/backbone_text_streaming.yaml"
    with refused(
        "'pretrained/text_streaming' does not exist", f"train it first: python train.py fit --config {recipe}"
    ):
        HFBackbone("pretrained/text_streaming")
    assert (Path(__file__).parents[3] / recipe).is_file()


def test_broken_or_incomplete_weights(tmp_path: Path) -> None:
    folder = save_family("vit", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = next(
        name for name in weights if name.startswith("encoder") or "layers.1" in name or "layer.1" in name
    )
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with refused("lacks 1 weights", "random"):
        HFBackbone(str(folder))
    (folder / "model.safetensors").write_bytes(b"no safetensors at all")
    with refused("could not be loaded", "check the folder"):
        HFBackbone(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with refused("could not be loaded", "safetensors"):
        HFBackbone(str(folder))
    (folder / "config.json").write_text('{"model_type": "no-such-family"}')
    with refused("could not be loaded", "no-such-family"):
        HFBackbone(str(folder))


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with refused("could not be loaded"):
        HFBackbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_timesformer_cannot_be_seen(tmp_path: Path) -> None:
    hf.TimesformerModel(hf.TimesformerConfig(**PICTURE, num_frames=2)).save_pretrained(tmp_path)
    with refused("timesformer", "cannot be seen", "VideoMAE"):
        HFBackbone(str(tmp_path))


def test_other_architectures(tmp_path: Path) -> None:
    shared = {**TEXT, "embedding_size": 16}
    hf.AlbertModel(hf.AlbertConfig(**shared)).save_pretrained(tmp_path / "albert")
    with refused("share"):
        HFBackbone(str(tmp_path / "albert"), layers=[0])(make_inputs("bert"))
    swin = hf.SwinModel(
        hf.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    swin.save_pretrained(tmp_path / "swin")
    with refused("swin", "plain transformer"):
        HFBackbone(str(tmp_path / "swin"))


def test_a_layer_that_was_never_seen(folders: dict[str, str]) -> None:
    backbone = HFBackbone(folders["llama"], layers=3)
    backbone.model.layers[1].self_attn.config = type(backbone.config)(**GROUPED, attn_implementation="eager")
    with refused("llama", "cannot be seen"):
        backbone(make_inputs("llama"))
