"""Export and its reading: equal outputs, other types, no Lightning, and clear errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_runs import Work

import qm_lightning.merging as merging
from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.small import save_backbone, small_llama
from qm_lightning.cli import main
from qm_lightning.described import describe, make
from qm_lightning.errors import UserError
from qm_lightning.export import from_pretrained, save_pretrained
from qm_lightning.generation import Generation, Sampling, WritingParts
from qm_lightning.merging import FixedBudget, MassBudget, Merger, QuickMerge
from qm_lightning.modules import MultimodalModule, QuickMergeModule
from qm_lightning.modules.multimodal import ModalityPath
from qm_lightning.priors import ARPrior
from qm_lightning.runtime.trained_run import open_trained_run

IDS = torch.tensor([list(b"import os, sys\n")])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

WITHOUT_LIGHTNING = """
import sys
for name in ("lightning", "pytorch_lightning", "wandb", "torchmetrics", "jsonargparse"):
    sys.modules[name] = None  # importing it raises
import torch
from qm_lightning.export import from_pretrained
model = from_pretrained(sys.argv[1])
backbone = model.load_backbone()
ids = torch.tensor([list(b"import os, sys\\n")])
out = model(backbone({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), ids)
print(f"{out.logits.double().sum().item():.6f}")
from qm_lightning.generation import Generation, Sampling, WritingParts
parts = WritingParts(backbone, model.merger, model.prior)
*_, rows = Generation(parts, list(ids), lambda written: "", Sampling(4, temperature=0.0))
print(len(rows[0].ids))
"""


@pytest.fixture(scope="module")
def exported(streaming_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", str(streaming_run), "--ckpt_path", "last", "--out", str(out)]) == 0
    return out


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_round_trip_changes_no_bit(exported: Path, streaming_run: Path) -> None:
    run = open_trained_run(streaming_run, "last")
    model = from_pretrained(exported)
    _, _, trained = run.module({"inputs": INPUTS, "targets": IDS})
    output = model(model.load_backbone()(INPUTS), IDS)
    assert torch.equal(output.logits, trained.logits)
    live = {f"merger.{k}": v for k, v in run.module.merger.state_dict().items()}
    assert live.keys() < model.state_dict().keys()
    assert torch.equal(model.merger.threshold.threshold, live["merger.threshold.threshold"])


def test_the_files_say_what_they_are(exported: Path, work: Work) -> None:
    assert sorted(file.name for file in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert (config["format"], config["mode"], config["eos_id"], config["vocab_size"]) == (
        1,
        "streaming",
        256,
        257,
    )
    assert config["backbone"]["name_or_path"] == str(work.root / "backbone")
    assert config["merger"]["class"] == "StreamingQuickMerge"
    assert config["facts"]["step"] == 2
    card = (exported / "README.md").read_text()
    bits = config["facts"]["metrics"]["quality/bits"]
    assert f"| quality/bits | {bits:.4g} |" in card
    assert config["backbone"]["fingerprint"] in card


def test_it_runs_without_lightning(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING, str(exported)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    total, written = done.stdout.split()
    model = from_pretrained(exported)
    assert float(total) == pytest.approx(
        model(model.load_backbone()(INPUTS), IDS).logits.double().sum().item(), abs=1e-3
    )
    assert written == "4"


def test_another_type_merges_alike(exported: Path) -> None:
    plain, half = from_pretrained(exported), from_pretrained(exported, dtype=torch.bfloat16)
    backbone = plain.load_backbone()
    assert half.prior.head.weight.dtype == torch.bfloat16
    assert half.merger.threshold.threshold.dtype == torch.float64
    tokens = backbone(INPUTS)
    assert torch.equal(half.merge(tokens).assignment, plain.merge(tokens).assignment)
    torch.testing.assert_close(
        half(tokens, IDS).logits.float(), plain(tokens, IDS).logits, rtol=0.1, atol=0.1
    )
    assert from_pretrained(exported, device="meta").prior.head.weight.is_meta
    with pytest.raises(UserError, match="device 'teapot' cannot be used"):
        from_pretrained(exported, device="teapot")


def test_the_conditioning_mode(conditioning_run: Path, tmp_path: Path) -> None:
    assert main(["export", "--run_dir", str(conditioning_run), "--out", str(tmp_path / "m")]) == 0
    run, model = open_trained_run(conditioning_run), from_pretrained(tmp_path / "m")
    merged = model.merge(model.load_backbone()(INPUTS))
    assert model.config["mode"] == "conditioning"
    with pytest.raises(UserError, match="has one merger only"):
        from_pretrained(tmp_path / "m", modality="text")
    assert "The run was not tested" in (tmp_path / "m/README.md").read_text()
    want = run.module.prior.generate(run.module.merge({"inputs": INPUTS})[1], 5, temperature=0.0)
    assert torch.equal(model.prior.generate(merged, 5, temperature=0.0), want)


def test_several_modalities(work: Work, tmp_path: Path) -> None:
    torch.manual_seed(2)
    save_backbone(small_llama(width=16, depth=1, heads=2, max_tokens=64), tmp_path / "narrow", None)
    folders = {"wide": str(work.root / "backbone"), "narrow": str(tmp_path / "narrow")}
    module = MultimodalModule(
        {
            name: ModalityPath(HFBackbone(folder, layers=1), QuickMerge(FixedBudget(2.0), learn_weights=True))
            for name, folder in folders.items()
        },
        lambda width, vocab: ARPrior(width, vocab, dim=16, depth=1, heads=2),
        vocab_size=7,
        eos_id=6,
    )
    module.eval().requires_grad_(False)  # as exports are: gradients take other kernels, which round otherwise
    save_pretrained(module, tmp_path / "m")
    targets = torch.tensor([[1, 2, 6]])
    for name in folders:
        model = from_pretrained(tmp_path / "m", modality=name)
        want = module({"inputs": INPUTS, "targets": targets, "modality": name})[2].logits
        assert torch.equal(model(model.load_backbone()(INPUTS), targets).logits, want)
        assert f'from_pretrained(".", modality="{name}")' in (tmp_path / "m/README.md").read_text()
    for modality in (None, "smell"):
        with pytest.raises(UserError, match=r"holds several modalities.*one of wide, narrow"):
            from_pretrained(tmp_path / "m", modality=modality)


def test_a_part_of_a_mixture_writes_what_its_view_writes(work: Work, tmp_path: Path) -> None:
    """Its merged tokens lie in coordinates of their own, and those of the other part would be other text."""
    run = open_trained_run(work.mixture_run())
    torch.nn.init.normal_(run.module.prior.head.weight, std=1.0)
    save_pretrained(run.module, tmp_path / "m")
    assert isinstance(run.module, MultimodalModule)
    written = []
    for name in ("first", "second"):
        view, model = run.module.view(name), from_pretrained(tmp_path / "m", modality=name)
        exported = WritingParts(model.load_backbone(), model.placed_merger, model.prior)
        for parts in (view, exported):
            generation = Generation(parts, list(IDS), lambda ids: "", Sampling(8, temperature=0.0))
            *_, rows = generation
            written.append(rows[0].ids)
    assert written[0] == written[1] != written[2] == written[3]


def test_the_run_of_a_mixture(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(work.mixture_run())
    assert main(["export", run, "--out", str(tmp_path / "m")]) == 0
    model = from_pretrained(tmp_path / "m", modality="second")
    weights = open_trained_run(Path(run)).module.state_dict()
    assert {f"prior.{name}": x.shape for name, x in model.prior.state_dict().items()} == {
        name: x.shape for name, x in weights.items() if name.startswith("prior.")
    }
    assert all(torch.equal(x, weights[f"prior.{name}"]) for name, x in model.prior.state_dict().items())
    writing = ["--prompt", "import os", "x", "--modality", "second", "--max_new_tokens", "4"]
    written = []
    for source in (run, str(tmp_path / "m")):
        capsys.readouterr()
        assert main(["generate", source, *writing]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[0].startswith("--- prompt 1\n")
    assert "generate . --modality second --prompt TEXT" in (tmp_path / "m/README.md").read_text()
    capsys.readouterr()
    for call, expected in (
        (["export", run, "--out", str(tmp_path / "n"), "--backbone", "x"], "a backbone for each modality"),
        (["generate", run, "--prompt", "a"], "no --modality was given and the parts of"),
        (
            ["generate", run, "--prompt", "a", "--modality", "third"],
            "read text are first, second; expected one",
        ),
        (["generate", str(tmp_path / "m"), "--prompt", "a"], "read text are first, second; expected one"),
    ):
        assert main(call) == 2
        assert expected in capsys.readouterr().err.strip().splitlines()[-1]


class Own(QuickMerge):
    """A user's merger."""


def test_mergers_of_ones_own(work: Work, tmp_path: Path) -> None:
    backbone = HFBackbone(str(work.root / "backbone"), layers=2)
    prior = ARPrior(32, 7, dim=16, depth=1, heads=2)
    module = QuickMergeModule(backbone, Own(FixedBudget(3.0), learn_weights=True), prior)  # type: ignore[arg-type]
    save_pretrained(module, tmp_path / "m")
    with pytest.raises(UserError, match=r"names the class 'Own'.*classes="):
        from_pretrained(tmp_path / "m")
    model = from_pretrained(tmp_path / "m", classes=[Own])
    assert isinstance(model.merger, Own)
    assert "merger.salience" in " ".join(model.state_dict())
    module.merger = Own(FixedBudget(3.0), salience_weights=torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Own\(salience_weights=...\) was given a Tensor"):
        save_pretrained(module, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def breaking(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (breaking("config.json", lambda _: None), "has no config.json"),
        (breaking("model.safetensors", lambda _: None), "no model.safetensors in"),
        (breaking("config.json", lambda b: b[:40]), "is no JSON"),
        (breaking("config.json", lambda _: b"{}"), "is no export of this project"),
        (breaking("config.json", lambda b: b.replace(b'"format": 1', b'"format": 9')), "has format 9; expected"),
        (breaking("config.json", lambda b: b.replace(b"StreamingQuickMerge", b"os.system")), "class 'os.system'"),
        (breaking("config.json", lambda b: b.replace(b'"max_span"', b'"max_spam"')), "does not take these arguments"),
        (breaking("config.json", lambda b: b.replace(b'"dim": 32', b'"dim": 64')), "weights do not fit"),
        (breaking("model.safetensors", lambda b: b[:-10]), "is broken"),
    ],
)  # fmt: skip
def test_broken_exports_are_named(
    breaks: Callable[[Path], None], message: str, exported: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path / "m")
    breaks(folder)
    with pytest.raises(UserError, match=message):
        from_pretrained(folder)


def test_another_backbone_is_refused(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_backbone(small_llama(width=32, depth=2, heads=2, max_tokens=96), tmp_path / "other", None)
    model = from_pretrained(exported)
    with pytest.raises(UserError, match="has other weights; expected fingerprint"):
        model.load_backbone(str(tmp_path / "other"))


def test_mistakes_are_one_line(
    exported: Path, streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (exported / "config.json").stat().st_mtime_ns
    for call, expected in (
        ([str(streaming_run), "--out", str(exported)], "is not empty"),
        ([str(streaming_run), "--out", str(exported / "config.json")], "config.json is a file; expected"),
        (["--out", str(tmp_path / "m")], "found no RUN_DIR"),
        ([str(tmp_path), "--out", str(tmp_path / "m")], "holds no config.yaml"),
        ([str(streaming_run)], "--out"),
    ):
        assert main(["export", *call]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert expected in line
    assert (exported / "config.json").stat().st_mtime_ns == before
    assert (
        main(["export", str(streaming_run), "--ckpt_path", "last", "--out", str(exported), "--overwrite"])
        == 0
    )


MERGERS = [
    cls
    for name in merging.__all__
    if issubclass(cls := getattr(merging, name), Merger) and not getattr(cls, "__abstractmethods__", None)
]


@pytest.mark.parametrize("cls", MERGERS)
def test_every_merger_can_be_described(cls: type[Merger]) -> None:
    arguments = {} if cls.__name__ == "NoMerge" else {"budget": FixedBudget(3.0)}
    known = {cls.__name__: cls, "FixedBudget": FixedBudget, "MassBudget": MassBudget}
    written = json.loads(json.dumps(describe(cls(**arguments))))
    assert json.loads(json.dumps(describe(make(written, known, "here")))) == written
