"""A wrong option is named in one line."""

from pathlib import Path

import pytest

from qm_lightning.cli import main
from qm_lightning.runtime.option_errors import explain

ROOT = Path(__file__).parents[3]


def test_an_unknown_option_suggests_the_nearest() -> None:
    line = explain(
        "unrecognized arguments: --trainer.max_step 3", ["--trainer.max_steps", "--trainer.min_steps"]
    )
    assert line.startswith("found --trainer.max_step, which is no option")
    assert line.endswith("did you mean --trainer.max_steps?")


def test_other_messages_become_one_line() -> None:
    assert explain("a\n   b") == "a b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_step", "3"], "found --trainer.max_step, which is no option"),
        (
            ["--model.mergr", "ToMe"],
            "found --model.mergr, which that class does not take; expected one of its arguments; "
            "did you mean merger?",
        ),
        (
            ["--model.merger.budget.compresion", "3"],
            "found --model.merger.budget.compresion, which that class does not take; "
            "expected one of its arguments; did you mean compression?",
        ),
        (
            ["--model.prior.xyz", "3"],
            "found --model.prior.xyz, which that class does not take; expected one of dim, depth, heads",
        ),
    ],
)
def test_the_command_line_names_what_is_wrong(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(ROOT / "configs/experiment/image.yaml"), *arguments]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert expected in line
    assert len(line) < 200
