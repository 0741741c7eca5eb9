"""What a resume changes is named; where a run is kept is not."""

from qm_lightning.runtime.config_diff import changed_settings, describe_changes


def test_changes_are_dotted_names_with_both_values() -> None:
    old = {"model": {"lr": 0.1, "merger": "ToMe"}, "run_dir": "a", "callbacks": [1]}
    new = {"model": {"lr": 0.2, "merger": "ToMe", "depth": 3}, "run_dir": "b", "callbacks": [1]}
    assert changed_settings(old, new) == ["model.depth: None -> 3", "model.lr: 0.1 -> 0.2"]


def test_equal_trees_say_nothing() -> None:
    assert describe_changes({"a": {"b": 1}, "ckpt_path": None}, {"a": {"b": 1}, "ckpt_path": "last"}) is None


def test_many_changes_are_cut() -> None:
    line = describe_changes({f"k{i:02d}": 0 for i in range(30)}, {f"k{i:02d}": 1 for i in range(30)})
    assert line is not None
    assert line.startswith("resume: 30 settings differ")
    assert line.endswith("and 10 more")
