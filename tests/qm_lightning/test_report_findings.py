"""The findings in words, each checked against figures chosen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_cases import results

from qm_lightning.reporting.columns import cell, shown
from qm_lightning.reporting.findings import Findings, find
from qm_lightning.reporting.rows import Row
from qm_lightning.reporting.runs import Run


def run(merger: str, target: float | None, seed: int, loss: float, **metrics: float) -> Run:
    raw: dict[str, Any] = results(merger, target, seed, loss)
    values = raw["metrics"] | raw["cost"] | {"quality/nats": loss, "quality/exact": 1 - loss}
    values["tokens/kept_mean"] = 64 / (target or 1.0)
    return Run(Path(f"{merger}-{target}-{seed}"), "image", merger, target, seed, values | metrics, raw)


def runs(merger: str, target: float | None, losses: tuple[float, ...], **metrics: float) -> list[Run]:
    return [run(merger, target, seed, loss, **metrics) for seed, loss in enumerate(losses)]


def everything(findings: Findings) -> str:
    return " ".join([findings.headline, *findings.details, *findings.caveats])


def test_wins_and_losses_are_told_alike() -> None:
    found = find(
        runs("QuickMerge", 4.0, (0.10, 0.11))
        + runs("ToMe", 4.0, (0.20, 0.21))
        + runs("QuickMerge", 8.0, (0.30, 0.31))
        + runs("ToMe", 8.0, (0.20, 0.21))
    )
    assert found.headline == (
        "QuickMerge has the lowest loss at 1 of 2 compressions (4x); "
        "at 8x ToMe is lower, 0.205 against 0.305 nats per target token."
    )


def test_losing_everywhere_is_said_plainly() -> None:
    found = find(runs("QuickMerge", 4.0, (0.3, 0.31)) + runs("ToMe", 4.0, (0.2, 0.21)))
    assert found.headline.startswith("QuickMerge does not have the lowest loss; at 4x ToMe is lower")


def test_a_loss_that_no_printed_digit_shows_is_called_level() -> None:
    found = find(runs("QuickMerge", 4.0, (0.1742,)) + runs("ToMe", 4.0, (0.1738,)))
    assert "at 4x ToMe is level with it, 0.174 nats per target token" in found.headline


def test_a_gap_within_the_spread_is_not_called_a_win() -> None:
    """Differences of 0.002, -0.008 and 0.012: mean 0.002, deviation 0.01, standard error 0.0058."""
    found = find(runs("QuickMerge", 4.0, (0.09, 0.1, 0.11)) + runs("ToMe", 4.0, (0.092, 0.092, 0.122)))
    assert "(4x*)" in found.headline
    assert "not decided" in found.headline
    assert (
        "a gap of 0.002 \u00b1 0.006 within 3 seeds, less than 2 standard errors: not decided"
        in found.details[0]
    )


def test_a_clear_gap_is_called_clear() -> None:
    found = find(runs("QuickMerge", 4.0, (0.09, 0.1, 0.11)) + runs("ToMe", 4.0, (0.19, 0.2, 0.21)))
    assert "*" not in found.headline
    assert "a clear gap of 0.100" in found.details[0]


def test_what_a_seed_moves_for_all_methods_does_not_hide_a_gap() -> None:
    """Deviations of 0.1, yet on each seed ToMe is 0.01 or 0.012 behind: 0.011, standard error 0.001."""
    found = find(runs("QuickMerge", 4.0, (0.1, 0.3)) + runs("ToMe", 4.0, (0.11, 0.312)))
    assert "a clear gap of 0.011 \u00b1 0.001 within 2 seeds" in found.details[0]


def test_rows_of_other_seeds_are_compared_by_their_means() -> None:
    """Means 0.1 and 0.102, deviations 0.01, no seed in common: a standard error of 0.0082."""
    ours = runs("QuickMerge", 4.0, (0.09, 0.1, 0.11))
    theirs = [run("ToMe", 4.0, 10 + i, loss) for i, loss in enumerate((0.092, 0.102, 0.112))]
    assert (
        "a gap of 0.002 \u00b1 0.008, less than 2 standard errors: not decided"
        in find(ours + theirs).details[0]
    )


def test_one_seed_does_not_rule_out_chance() -> None:
    found = find(runs("QuickMerge", 4.0, (0.1,)) + runs("ToMe", 4.0, (0.2,)))
    assert "on one seed: chance is not ruled out" in found.details[0]
    assert "One seed only: no spread is known." in found.caveats


def test_third_place_names_its_rank() -> None:
    found = find(
        runs("ToMe", 4.0, (0.10, 0.11))
        + runs("UniformPool", 4.0, (0.20, 0.21))
        + runs("QuickMerge", 4.0, (0.30, 0.31))
    )
    assert "QuickMerge is number 3 of 3" in found.details[0]


def test_exact_match_that_disagrees_is_pointed_out() -> None:
    found = find(
        runs("QuickMerge", 4.0, (0.1, 0.11), **{"quality/exact": 0.5})
        + runs("ToMe", 4.0, (0.2, 0.21), **{"quality/exact": 0.6})
    )
    assert "Exact match says otherwise: ToMe leads (60.0 %)" in found.details[0]


def test_reference_of_all_tokens() -> None:
    found = find(
        runs("NoMerge", None, (0.15, 0.16))
        + runs("QuickMerge", 4.0, (0.1, 0.11))
        + runs("ToMe", 4.0, (0.2, 0.21))
    )
    (line,) = [
        line for line in found.details if line.startswith("All 64 tokens (NoMerge): 0.155 \u00b1 0.007 nats.")
    ]
    assert line.endswith("With fewer tokens, as good or better: QuickMerge 4x.")
    worse = find(runs("NoMerge", None, (0.01,)) + runs("ToMe", 4.0, (0.2,)))
    assert any("Every merger loses to it." in line for line in worse.details)


def test_front_and_rivals_that_beat_ours() -> None:
    """ToMe at 8x is below QuickMerge at 8x; at 4x no rival is."""
    found = find(
        runs("QuickMerge", 4.0, (0.1, 0.1))
        + runs("QuickMerge", 8.0, (0.3, 0.3))
        + runs("ToMe", 4.0, (0.2, 0.2))
        + runs("ToMe", 8.0, (0.25, 0.25))
    )
    assert "On the Pareto front of tokens kept against loss: ToMe 8x and QuickMerge 4x." in found.details
    assert (
        "A rival is lower than QuickMerge with no more tokens at 8x (by ToMe 8x, 0.250 on 8 tokens)."
        in found.details
    )
    good = find(runs("QuickMerge", 4.0, (0.1, 0.1)) + runs("ToMe", 4.0, (0.2, 0.2)))
    assert "Nowhere is a rival lower than QuickMerge with no more tokens." in good.details


def test_missed_compression_is_a_caveat() -> None:
    found = find(
        runs("QuickMerge", 4.0, (0.1, 0.11), **{"tokens/compression": 3.5}) + runs("ToMe", 4.0, (0.2, 0.3))
    )
    assert [line for line in found.caveats if "QuickMerge was asked for 4x and gave 3.50x" in line]
    assert not [line for line in found.caveats if "ToMe" in line]


@pytest.mark.parametrize(
    ("key", "words"), [("steps", "training steps"), ("samples", "test samples"), ("split", "split")]
)
def test_unequal_work_is_a_caveat(key: str, words: str) -> None:
    pair = [run("QuickMerge", 4.0, 0, 0.1), run("ToMe", 4.0, 0, 0.2)]
    assert "not the same work" not in everything(find(pair))
    pair[0].raw[key] = "other"
    assert f"The runs differ in {words}" in everything(find(pair))


def test_unequal_seeds_are_a_caveat() -> None:
    found = find(runs("QuickMerge", 4.0, (0.1, 0.1, 0.1)) + runs("ToMe", 4.0, (0.2,)))
    assert "The number of seeds differs between rows, from 1 to 3." in found.caveats
    # Of three and two seeds, two are common: differences of 0.11 and 0.12, whatever the third one had.
    uneven = find(runs("QuickMerge", 4.0, (0.1, 0.2, 0.3)) + runs("ToMe", 4.0, (0.21, 0.32)))
    assert "a clear gap of 0.115 \u00b1 0.005 within 2 seeds" in uneven.details[0]


def test_without_our_method_the_leaders_are_listed() -> None:
    found = find(runs("ToMe", 4.0, (0.1, 0.11)) + runs("UniformPool", 4.0, (0.2, 0.21)))
    assert found.headline == "Lowest loss: ToMe at 4x."


def test_one_method_alone_claims_nothing() -> None:
    found = find(runs("QuickMerge", 4.0, (0.1, 0.11)))
    assert found.headline == (
        "QuickMerge reaches 0.105 \u00b1 0.007 nats per target token on 16 of 64 tokens; "
        "no other method was run at the same compression."
    )


def test_no_quality_at_all_is_not_fatal() -> None:
    only = run("ToMe", 4.0, 0, 0.1)
    only.values.clear()
    assert find([only]).headline.startswith("No run says how good it is")


def test_label_scores_have_columns() -> None:
    only = run("QuickMerge", 4.0, 0, 0.1)
    only.values.clear()
    only.values.update(
        {"labels/f1": 0.5, "labels/recall": 0.9, "labels/precision": 0.4, "labels/exact": 0.125}
    )
    row = Row("QuickMerge", 4.0, (only,))
    assert {c.title: cell(row, c) for c in shown([row])} == {
        "labels F1": "0.500", "recall": "0.900", "precision": "0.400", "sets %": "12.5",
    }  # fmt: skip
