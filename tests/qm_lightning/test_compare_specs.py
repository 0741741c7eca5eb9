"""Mergers, compressions and overrides as they are written on the command line."""

from __future__ import annotations

import pytest

from qm_lightning.comparing.specs import (
    check_overrides,
    parse_compressions,
    parse_specs,
    split_outside_brackets,
)
from qm_lightning.errors import UserError


def test_names_and_arguments() -> None:
    specs = parse_specs(
        "QuickMerge,ToFu(mode=mlerp), QuickMerge(budget=FixedBudget, budget.floor=0.2,x=[1,2])"
    )
    assert [spec.label for spec in specs] == [
        "QuickMerge",
        "ToFu(mode=mlerp)",
        "QuickMerge(budget=FixedBudget,budget.floor=0.2,x=[1,2])",
    ]
    assert [spec.name for spec in specs] == ["QuickMerge", "ToFu", "QuickMerge"]
    assert specs[2].arguments == (("budget", "FixedBudget"), ("budget.floor", "0.2"), ("x", "[1,2]"))
    assert specs[2].get("budget") == "FixedBudget"
    assert specs[0].get("budget") is None
    assert parse_specs("ToMe()")[0].arguments == ()


def test_commas_in_brackets_do_not_split() -> None:
    assert split_outside_brackets("a,b(c,[d,e]),f{g,h}") == ["a", "b(c,[d,e])", "f{g,h}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME"),
        ("ToMe,", "expected NAME"),
        ("ToMe(x=1", "expected NAME"),
        ("ToMe)", "expected NAME"),
        ("To Me!", "expected NAME"),
        ("ToMe(x)", "expected key=value"),
        ("ToMe(=1)", "expected key=value"),
        ("ToMe(x=)", "expected key=value"),
        ("ToMe(x=1,)", "expected key=value"),
        ("ToMe,ToMe", "names ToMe twice"),
        ("ToMe(budget.compression=3)", "expected --compressions"),
        ("ToMe(seed=3)", "expected --compressions and --seeds"),
    ],
)
def test_malformed_mergers(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_specs(text)


def test_compressions() -> None:
    assert parse_compressions("1,2.37,8") == [1.0, 2.37, 8.0]


@pytest.mark.parametrize("text", ["", "0.9", "-2", "nan", "inf", "2,2.0", "4x", "1;2"])
def test_wrong_compressions(text: str) -> None:
    with pytest.raises(UserError, match="--compressions has"):
        parse_compressions(text)


@pytest.mark.parametrize(
    "override",
    [
        "--run_dir=x",
        "--seed_everything",
        "--model.merger",
        "--model.init_args.merger.class_path",
        "--fresh",
        "--ckpt_path",
    ],
)
def test_overrides_that_the_comparison_sets_are_refused(override: str) -> None:
    with pytest.raises(UserError, match="is set for each cell by the comparison"):
        check_overrides(["--trainer.max_steps", "3", override, "x"])


def test_other_overrides_pass_and_stray_words_do_not() -> None:
    check_overrides(["--trainer.max_steps", "3", "--model.merger_free", "--data.init_args.batch_size=8"])
    with pytest.raises(UserError, match="'word' is no option"):
        check_overrides(["word"])
