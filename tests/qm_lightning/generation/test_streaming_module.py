"""The streaming experiment as a user types it, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from text_runs import Work

from qm_lightning.backbones import HFBackbone
from qm_lightning.cli import main
from qm_lightning.errors import UserError
from qm_lightning.merging import FixedBudget, FixedStride
from qm_lightning.modules import StreamingModule
from qm_lightning.modules.compiling import CompileOptions, call_in_buckets, in_buckets
from qm_lightning.priors import StreamingPrior


@pytest.fixture(scope="module")
def module(work: Work) -> StreamingModule:
    torch.manual_seed(0)
    prior = StreamingPrior(32, 257, dim=32, depth=1, heads=2, local_dim=32, local_heads=2)
    return StreamingModule(
        HFBackbone(str(work.root / "backbone"), layers=2),
        FixedStride(FixedBudget(3.0)),
        prior,  # type: ignore[arg-type]
    )


def batch_of(text: bytes) -> dict[str, object]:
    ids = torch.tensor([list(text)])
    return {
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "targets": ids,
        "valid": torch.ones(1, dtype=torch.bool),
    }


def test_a_run_ends_with_bits_per_byte(streaming_run: Path) -> None:
    results = json.loads((streaming_run / "results.json").read_text())
    metrics = results["metrics"]
    assert results["merger"] == "StreamingQuickMerge"
    assert metrics["quality/bits"] == pytest.approx(metrics["quality/nats"] / math.log(2), rel=1e-5)
    assert 2.0 < metrics["quality/bits"] < 9.0
    assert metrics["tokens/compression"] > 1.0
    assert results["cost"]["prior_flops_per_sample"] > 0
    weights = torch.load(streaming_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert "merger.threshold.threshold" in weights
    assert not [key for key in weights if key.startswith("backbone.")]


def test_predict_writes_continuations(streaming_run: Path, work: Work) -> None:
    assert main(["predict", *work.options("streaming"), "--model.predict_tokens", "3"]) == 0
    lines = (streaming_run / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in lines] == list(range(6))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.merger", "TopKPrune"], "class 'ordered': its budget reads the whole sequence"),
        (["--model.merger", "ToMe"], "class 'global': its groups join tokens from anywhere"),
        (["--data.targets", "stored"], "no target.txt"),
        (["--model.compile.bucket", "0"], "compile.bucket=0"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str], expected: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--model.merger.budget.class_path", "qm_lightning.merging.FixedBudget"]
    extra = extra + budget if "merger" in extra[0] else extra
    assert main(["fit", *work.options("refused"), "--fresh", "true", *extra]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_other_targets_than_the_text_are_refused(module: StreamingModule) -> None:
    batch = batch_of(b"def f(x):")
    module.eval()(batch)
    for targets in (torch.tensor([[1, 2]]), batch["targets"] + 1):  # type: ignore[operator]
        with pytest.raises(UserError, match="predicts the text itself"):
            module({**batch, "targets": targets})


def test_the_likelihood_of_a_prefix_does_not_depend_on_what_follows(module: StreamingModule) -> None:
    text = b"import os\nimport sys\n"
    whole = module.eval()(batch_of(text))[2].logits
    for cut in (1, 5, 12):
        torch.testing.assert_close(module(batch_of(text[:cut]))[2].logits, whole[:, :cut], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [7, 16, 20])
def test_targets_in_buckets_change_nothing(length: int, module: StreamingModule) -> None:
    """Rows of padding may lie far behind the text."""
    batch = batch_of(b"import os\nimport sys\n"[:length])
    _, merged, output = module.eval()(batch)
    _, padded = call_in_buckets(module.prior, merged, batch["targets"], CompileOptions(prior=True))
    torch.testing.assert_close(padded.logits, output.logits, rtol=0, atol=1e-5)


def test_buckets_change_nothing(module: StreamingModule) -> None:
    batch = batch_of(b"import os\nimport sys\n")
    _, merged, output = module.eval()(batch)
    padded = in_buckets(merged, 16)
    assert padded.mask.shape[1] == 16
    assert in_buckets(padded, 16) is padded
    torch.testing.assert_close(module.prior(padded, batch["targets"]).logits, output.logits)


@pytest.mark.slow
def test_compiled_is_eager(work: Work) -> None:
    """Needs a C++ compiler."""
    made = []
    for options in (CompileOptions(), CompileOptions(prior=True, merger=True)):
        torch.manual_seed(0)
        module = StreamingModule(
            HFBackbone(str(work.root / "backbone"), layers=2),
            FixedStride(FixedBudget(3.0)),
            lambda width, vocab: StreamingPrior(
                width, vocab, dim=32, depth=1, heads=2, local_dim=32, local_heads=2
            ),
            vocab_size=257,
            compile=options,
        )
        made.append(module.eval())
    eager, compiled = made
    assert list(eager.state_dict()) == list(compiled.state_dict())
    batch = batch_of(b"import os\nimport sys\n")
    torch.testing.assert_close(compiled(batch)[2].logits, eager(batch)[2].logits, rtol=1e-4, atol=1e-4)
