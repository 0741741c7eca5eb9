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
        (["--model.merger", "tome"], "found --model.merger tome, which is no class that goes there"),
        (
            ["--model.prior.xyz", "3"],
            "found --model.prior.xyz, which that class does not take; expected one of dim, depth, heads",
        ),
        (
            ["--config", "nope.yaml"],
            "nope.yaml; expected an experiment; give --config configs/experiment/NAME",
        ),
        (["--modle.depth", "3"], "did you mean --model?"),
        (
            ["--model.merger.budgt.compression", "3"],
            "found --model.merger.budgt.compression, which is no option",
        ),
        (
            ["--model.merger", "os.system"],
            "found --model.merger os.system; expected a class of qm_lightning,",
        ),
        (
            ["--model.merger", "ToMee"],
            "found --model.merger ToMee, which is no class that goes there; expected its short name or "
            "PACKAGE.CLASS; did you mean ToMe?",
        ),
        (["--model.merger", "InBackbone"], "found no merger of --model, which its class requires"),
        (
            ["--model", "qm_lightning.modules.Nope"],
            "found --model qm_lightning.modules.Nope, which is no class",
        ),
        (
            ["--model.merger.budget.compression", "x"],
            "found --model.merger.budget.compression x; expected float",
        ),
        (
            ["--logger.mode", "onlin"],
            "found --logger.mode onlin; expected one of 'online', 'offline', 'disabled'",
        ),
        (["stray"], "found 'stray', which belongs to no option"),
    ],
)
def test_the_command_line_names_what_is_wrong(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(ROOT / "configs/experiment/image.yaml"), *arguments]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert expected in line
    assert len(line) < 230


def test_no_experiment_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: found no data, model; expected an experiment; give --config"
    )


def test_fresh_is_a_flag_that_may_have_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    experiment = str(ROOT / "configs/experiment/image.yaml")
    for given in (["--fresh"], ["--fresh", "true"]):
        with pytest.raises(SystemExit):
            main(["fit", "--config", experiment, *given, "--print_config"])
        assert "fresh: true" in capsys.readouterr().out
