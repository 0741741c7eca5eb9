"""The doctor finds what would stop a training, and says how to mend it."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import free_port, write_shards

from qm_lightning.cli import main
from qm_lightning.commands import checkup
from qm_lightning.errors import UserError
from qm_lightning.runtime.experiment_file import lookup, read_experiment
from qm_lightning.runtime.rank_facts import RankFacts, config_hash, differences

ROOT = Path(__file__).parents[3]


def facts(rank: int, **changes: str) -> RankFacts:
    usual = {"host": f"node{rank}", "interface": f"10.0.0.{rank}", "device": "H100"}
    return RankFacts(rank, **usual | {"versions": "python 3.11, torch 2.13"} | changes)


def test_a_healthy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (
        main(["doctor", "--data", str(write_shards(tmp_path)), "--run_dir", str(tmp_path / "new" / "run")])
        == 0
    )
    text = capsys.readouterr().out
    for topic in ("versions", "imports", "device", "disk", "W&B", "shards"):
        assert f"good  {topic}" in text
    assert not (tmp_path / "new").exists()


def test_damaged_shards_and_a_missing_backbone_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    shard = next((write_shards(tmp_path) / "val").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert main(["doctor", "--data", str(tmp_path), "--backbone", str(tmp_path / "none")]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad")]
    assert len(lines) == 2
    assert str(shard) in lines[0]
    assert "none" in lines[1]


def test_a_torchvision_of_another_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_by_torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkup, "_NEEDED", ("broken_by_torchvision",))
    (finding,) = checkup.check_imports()
    assert finding.verdict == "bad"
    assert "uninstall it, or install both from one index" in finding.text


def test_an_old_or_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.0", "lightning": "2.6.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise checkup.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(
        checkup.metadata, "requires", lambda name: ["torch>=2.11", "lightning>=2.6.6", "rich"]
    )
    monkeypatch.setattr(checkup.metadata, "version", version)
    old, missing = checkup.check_versions()
    assert "torch 2.9.0; expected >=2.11" in old.text
    assert "rich is missing" in missing.text


def test_restarts_that_would_hang_are_noticed() -> None:
    (finding,) = checkup.check_restarts({"TORCHELASTIC_MAX_RESTARTS": "2"})
    assert finding.verdict == "warn"
    assert not checkup.check_restarts(
        {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    )


def test_a_check_that_fails_itself_does_not_hide_the_others() -> None:
    (finding,) = checkup.guarded(lambda: [][0], "disk")
    assert (finding.topic, finding.verdict) == ("disk", "bad")


def test_equal_ranks_may_have_their_own_hosts() -> None:
    assert differences([facts(0), facts(1)]) == []


def test_what_differs_is_named_with_its_ranks() -> None:
    ranks = [facts(0), facts(1, versions="python 3.11, torch 2.12"), facts(2, data="f00")]
    assert differences(ranks) == [
        "versions: rank 0, 2 has torch 2.13; rank 1 has torch 2.12",
        "data: rank 0, 1 has -; rank 2 has f00",
    ]


def test_the_hash_of_a_configuration_ignores_the_order_of_its_keys() -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


def test_experiment_files_are_read_with_their_groups() -> None:
    tree = read_experiment(ROOT / "configs/experiment/image.yaml")
    assert lookup(tree, "data.init_args.root") == "data/image"
    assert lookup(tree, "model.init_args.backbone.init_args.name_or_path") == "pretrained/image"
    assert lookup(tree, "model.nothing.here") is None
    with pytest.raises(UserError, match="cannot read"):
        read_experiment(ROOT / "configs/experiment/absent.yaml")


def test_nodes_without_a_launcher_says_how(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--nodes", "--run_dir", str(tmp_path)]) == 2
    assert "--nodes found one process" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
def test_nodes_meet_or_the_missing_one_is_named(missing: bool, tmp_path: Path) -> None:
    port = free_port()
    words = ["doctor", "--nodes", "--timeout", "60", "--run_dir", str(tmp_path)]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={r}",
             "--master-addr=127.0.0.1", f"--master-port={port}", "--",
             # The missing one is a node whose process ends before the meeting.
             "train.py", *(["--version"] if missing and r else words)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for r in (0, 1)
    ]  # fmt: skip
    texts = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    if missing:
        assert "rank 1 of 2 did not reach" in texts[0]
    else:
        assert [launcher.returncode for launcher in launchers] == [0, 0], texts
        assert texts[0].count("cpu x86_64") == 2
