"""``python train.py doctor [--nodes]``: finds what would stop a training, before it is started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from qm_lightning.commands import checkup
from qm_lightning.commands.checkup import Finding
from qm_lightning.commands.report import OneLineParser
from qm_lightning.errors import UserError
from qm_lightning.runtime.experiment_file import lookup, read_experiment


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = OneLineParser(
        prog="python train.py doctor",
        description="Check this machine, or with --nodes every process that a launcher has started. "
        "Exit code 2 if something would stop a training.",
        allow_abbrev=False,
    )
    options.add_argument("--config", type=Path, help="experiment file; names data and backbone")
    options.add_argument("--data", type=Path, help="folder with train/, val/, test/ (default: the config's)")
    options.add_argument("--backbone", help="name or folder of the backbone (default: the config's)")
    options.add_argument("--run_dir", type=Path, default=Path("runs"), help="where runs are kept")
    options.add_argument(
        "--nodes",
        action="store_true",
        help="meet the other processes and compare: configs/launch/torchrun.sh doctor --nodes",
    )
    options.add_argument("--timeout", type=int, default=60, help="seconds that --nodes waits for a rank")
    return options


def main(argv: Sequence[str]) -> int:
    """Examine, print, and say by the exit code whether a training could run.

    Args:
        argv: the options after the verb.

    Returns:
        0, or 2 if something is bad.
    """
    options = parser().parse_args(argv)
    tree = read_experiment(options.config) if options.config else {}
    findings = examine(options, tree)
    bad = [finding for finding in findings if finding.verdict == "bad"]
    if int(os.environ.get("RANK", "0")) == 0 or bad:
        _print(findings)
    if any(finding.topic == "imports" for finding in bad):
        return 2  # nothing else can be loaded
    if options.nodes:
        meet(options, tree)
    return 2 if bad else 0


def examine(options: argparse.Namespace, tree: dict[str, Any]) -> list[Finding]:
    """Everything that one process can find out alone."""
    imports = checkup.guarded(checkup.check_imports, "imports")
    if any(finding.verdict == "bad" for finding in imports):
        return [*checkup.guarded(checkup.check_versions, "versions"), *imports]
    data = options.data or lookup(tree, "data.init_args.root")
    backbone = options.backbone or lookup(tree, "model.init_args.backbone.init_args.name_or_path")
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", checkup.check_versions),
        ("imports", lambda: imports),
        ("device", checkup.check_devices),
        ("disk", lambda: checkup.check_disk(options.run_dir)),
        ("launcher", checkup.check_restarts),
        ("W&B", checkup.check_tracking),
    ]
    if data is not None and "://" in str(data):
        checks.append(
            ("shards", lambda: [Finding("shards", "warn", f"{data} is remote: not looked at here")])
        )
    elif data is not None:
        checks.append(("shards", lambda: checkup.check_shards(Path(data))))
    if backbone is not None:
        checks.append(("backbone", lambda: checkup.check_backbone(str(backbone))))
    return [finding for topic, check in checks for finding in checkup.guarded(check, topic)]


def meet(options: argparse.Namespace, tree: dict[str, Any]) -> None:
    """Meet the other processes, print the table of ranks, fail if they differ.

    Raises:
        UserError: a rank is missing, or differs.
    """
    import torch.distributed as dist

    from qm_lightning.runtime.rank_facts import collect_facts, differences
    from qm_lightning.runtime.rendezvous import gather, join
    from qm_lightning.runtime.world import resolve_world

    world = resolve_world(os.environ)
    if world.size == 1:
        raise UserError(
            "--nodes found one process; expected several; start it on every node as the training: "
            "GPUS=2 configs/launch/torchrun.sh doctor --nodes"
        )
    wait = timedelta(seconds=options.timeout)
    join(world, "cpu", wait)
    dist.monitored_barrier(timeout=wait)  # a full mesh: joining only needed the way to rank 0
    data = options.data or lookup(tree, "data.init_args.root")
    ranks = gather(collect_facts(world, tree or None, _fingerprint(data)))
    if world.rank == 0:
        _print_ranks(ranks)
    if lines := differences(ranks):
        raise UserError(f"the ranks differ: {' | '.join(lines)}; expected the same on all; see the table")


def _fingerprint(data: str | Path | None) -> str:
    from datamodules.errors import DataError
    from datamodules.shards.manifest import Manifest

    if data is None:
        return "-"
    try:
        return Manifest.load(Path(data) / "train").fingerprint
    except DataError:
        return "no index"


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"{finding.verdict:<5} {finding.topic:<9} {finding.text}", flush=True)


def _print_ranks(ranks: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "host", "interface", "device", "config", "data", "versions")
    for facts in ranks:
        table.add_row(
            str(facts.rank),
            facts.host,
            facts.interface,
            facts.device,
            facts.config,
            facts.data,
            facts.versions,
        )
    Console(width=max(120, Console().width)).print(table)
