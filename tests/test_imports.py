"""The rooms stay apart: who may import what (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"lightning", "wandb", "transformers", "datamodules"}
PURE = ["tokens.py", "attention.py", "merging", "priors", "losses"]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def files(*parts: str) -> list[Path]:
    path = ROOT.joinpath(*parts)
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_torch_only(room: str) -> None:
    found = {str(p): imported(p) & HEAVY for p in files("qm_lightning", room)}
    assert found
    assert not {p: names for p, names in found.items() if names}


def test_datamodules_know_nothing_of_the_models() -> None:
    found = files("datamodules")
    assert found
    assert not [p for p in found if "qm_lightning" in imported(p)]


def test_only_the_command_line_knows_both() -> None:
    allowed = ("cli.py", "commands")
    found = [p for p in files("qm_lightning") if "datamodules" in imported(p)]
    assert found
    assert not [p for p in found if p.relative_to(ROOT / "qm_lightning").parts[0] not in allowed]


def test_mergers_do_not_reach_back() -> None:
    source = "".join(p.read_text() for p in files("qm_lightning", "merging"))
    assert "qm_lightning.priors" not in source
    assert "qm_lightning.modules" not in source
