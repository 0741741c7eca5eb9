"""Launch files, trainer files and sweeps: what they say is accepted by the commands that they name."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qm_lightning.cli import main

ROOT = Path(__file__).parents[3]
SWEEPS = sorted((ROOT / "configs/sweep").glob("*.yaml"))


def flags(sweep: dict[str, Any]) -> list[str]:
    """What the sweep's agent puts for ${args}."""
    chosen = {
        name: options["values"][0] if "values" in options else options["min"]
        for name, options in sweep["parameters"].items()
    }
    return [f"--{name}={value}" for name, value in chosen.items()]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_sweeps_command_is_one_that_we_take(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    assert os.access(sweep["program"], os.R_OK)
    command = [part for part in sweep["command"] if part not in ("${env}", "${interpreter}", "${program}")]
    place = command.index("${args}")
    with pytest.raises(SystemExit) as end:
        main([*command[:place], *flags(sweep), "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["optimizer"]["learning_rate"] == 0.0003
    assert sweep["metric"]["name"] == "val/quality/nats"


def test_there_are_sweeps_for_one_and_for_many_devices() -> None:
    assert [path.name for path in SWEEPS] == ["image.yaml", "image_ddp.yaml"]


@pytest.mark.parametrize(("name", "strategy"), [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("cpu", "auto")])
def test_trainer_files_leave_the_sizes_to_the_launcher(name: str, strategy: str) -> None:
    options = yaml.safe_load((ROOT / f"configs/trainer/{name}.yaml").read_text())
    assert options.get("strategy", "auto") == strategy
    assert not {"devices", "num_nodes"} & options.keys()
    assert options["max_steps"] > 0


def arguments_of_torchrun(tmp_path: Path, *words: str, **env: str) -> list[str]:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "configs/launch/torchrun.sh"), *words],
        env={"PATH": os.environ["PATH"], "PYTHON": str(fake)} | env,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_torchrun_on_one_machine(tmp_path: Path) -> None:
    store, *rest = arguments_of_torchrun(tmp_path, "fit", "--config", "a b.yaml", GPUS="4", JOB="j")
    assert store == "1"  # without it restarts hang
    assert rest[:2] == ["-m", "qm_lightning.runtime.launcher"]
    assert {"--nnodes=1", "--nproc-per-node=4", "--rdzv-id=j", "--rdzv-endpoint=127.0.0.1:0"} <= set(rest)
    assert rest[rest.index("--") + 1].endswith("train.py")
    assert rest[-3:] == ["fit", "--config", "a b.yaml"]


@pytest.mark.parametrize(("head", "is_host"), [("some-other-node", "0"), (os.uname().nodename, "1")])
def test_torchrun_on_two_machines_knows_the_head(head: str, is_host: str, tmp_path: Path) -> None:
    rest = arguments_of_torchrun(tmp_path, "fit", NNODES="2", HEAD=head, PORT="29511")
    assert f"--rdzv-endpoint={head}:29511" in rest
    assert f"--rdzv-conf=is_host={is_host}" in rest


def test_the_slurm_file_runs_one_task_for_each_device_and_asks_for_time_to_save(tmp_path: Path) -> None:
    path = ROOT / "configs/launch/slurm.sbatch"
    options = [
        line.split(maxsplit=1)[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(options)
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(path), "fit", "--config", "x.yaml"], cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-4:] == ["train.py", "fit", "--config", "x.yaml"]
