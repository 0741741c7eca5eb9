"""What a comparison would run, found before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qm_lightning.comparing.cells import make_cells
from qm_lightning.comparing.plan import common_parts, known_mergers, make_plans
from qm_lightning.comparing.specs import parse_specs
from qm_lightning.errors import UserError


def base(root: Path, **merger_arguments: Any) -> dict[str, Any]:
    """The part of a resolved configuration that a plan reads."""
    merger = {
        "class_path": "qm_lightning.merging.QuickMerge",
        "init_args": {
            "budget": {
                "class_path": "qm_lightning.merging.EntropyBudget",
                "init_args": {"compression": 2.37},
            },
            **merger_arguments,
        },
    }
    backbone = {"class_path": "B", "init_args": {"name_or_path": str(root / "backbone")}}
    return {
        "name": "image",
        "run_dir": None,
        "trainer": {"max_steps": 10},
        "model": {"class_path": "M", "init_args": {"merger": merger, "backbone": backbone}},
        "data": {"class_path": "D", "init_args": {"root": str(root / "data"), "seed": 0}},
    }


def test_each_budget_is_named_and_no_merge_runs_once(tmp_path: Path) -> None:
    plans = make_plans(
        parse_specs("NoMerge,QuickMerge,ToMe,QuickMerge(budget=FixedBudget)"), [2.37, 4.0], base(tmp_path)
    )
    assert [(p.spec.label, p.compression) for p in plans] == [
        ("NoMerge", None),
        *(
            (label, c)
            for label in ("QuickMerge", "ToMe", "QuickMerge(budget=FixedBudget)")
            for c in (2.37, 4.0)
        ),
    ]
    budgets = [p.merger["init_args"]["budget"]["class_path"].rsplit(".", 1)[-1] for p in plans[1::2]]
    assert budgets == ["EntropyBudget", "FixedBudget", "FixedBudget"]
    assert plans[2].merger["init_args"]["budget"]["init_args"]["compression"] == 4.0
    assert json.loads(plans[2].options[1]) == plans[2].merger


def test_a_name_alone_is_the_merger_as_configured(tmp_path: Path) -> None:
    (plan,) = make_plans(parse_specs("QuickMerge"), [4.0], base(tmp_path, locality=0.7))
    assert plan.merger["init_args"]["locality"] == 0.7
    (plan,) = make_plans(
        parse_specs("QuickMerge(locality=0.2,budget.floor=0.3)"), [4.0], base(tmp_path, locality=0.7)
    )
    assert plan.merger["init_args"]["locality"] == 0.2
    assert plan.merger["init_args"]["budget"]["init_args"]["floor"] == 0.3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("QuickMerg", "did you mean QuickMerge"),
        ("Merger", "expected some of"),
        ("ToMe(colour=red)", "colour"),
        ("QuickMerge(budget=MassBudget)", "MassBudget takes no compression"),
        ("QuickMerge(locality=far)", "locality"),
        ("DynamicPooling(max_span=2)", r"\)': DynamicPooling: max_span=2 cannot reach .*; raise max_span$"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_plans(parse_specs(spec), [4.0], base(tmp_path))
    assert "\n" not in str(caught.value)


def test_known_mergers_are_classes_that_can_be_built() -> None:
    known = known_mergers()
    assert {"NoMerge", "QuickMerge", "ToMe"} <= set(known)
    assert "Merger" not in known
    assert "FixedBudget" not in known


def test_digest_follows_what_results_depend_on(tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    weights = tmp_path / "backbone" / "model.safetensors"
    weights.write_bytes(b"one")

    def digests(config: dict[str, Any]) -> list[str]:
        plans = make_plans(parse_specs("ToMe,QuickMerge"), [4.0], config)
        return [cell.digest for cell in make_cells(plans, 2, [], tmp_path / "out", common_parts(config))]

    first = digests(base(tmp_path))
    assert len(set(first)) == 4
    assert digests(base(tmp_path) | {"run_dir": "elsewhere"}) == first
    assert digests(base(tmp_path) | {"trainer": {"max_steps": 11}})[0] != first[0]
    weights.write_bytes(b"two")
    assert digests(base(tmp_path))[0] != first[0]


def test_seed_rules_weights_data_and_noise(tmp_path: Path) -> None:
    config = base(tmp_path)
    plans = make_plans(parse_specs("QuickMerge,ToMe"), [4.0], config)
    cells = make_cells(plans, 2, ["--config", "x"], tmp_path / "out", common_parts(config))
    assert [(c.spec.label, c.seed) for c in cells] == [
        ("QuickMerge", 0),
        ("ToMe", 0),
        ("QuickMerge", 1),
        ("ToMe", 1),
    ]
    for cell in cells:
        options = list(cell.options)
        assert options[options.index("--seed_everything") + 1] == str(cell.seed)
        assert options[options.index("--data.init_args.seed") + 1] == str(cell.seed)
    assert "--model.merger.init_args.seed" in cells[0].options
