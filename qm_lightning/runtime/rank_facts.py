"""What must be the same on every process of a training, compared before the training begins."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from typing import Any

import torch

from qm_lightning.errors import UserError
from qm_lightning.runtime.rendezvous import gather, local_address
from qm_lightning.runtime.world import World

COMPARED_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "wandb", "jsonargparse")


@dataclass(frozen=True)
class RankFacts:
    """One process.

    Attributes:
        rank: its number.
        host: name of its machine.
        interface: network interface and address towards rank 0.
        device: what it computes on.
        versions: Python and packages.
        config: hash of the resolved configuration; ``-`` if none was given.
        data: fingerprint of the shards that it sees; ``-`` if none was given.
    """

    rank: int
    host: str
    interface: str
    device: str
    versions: str
    config: str = "-"
    data: str = "-"


# Hosts and addresses may differ; a device may not, since the slowest one sets the pace and the rounding differs.
_SAME = ("device", "versions", "config", "data")


def collect_facts(world: World, config: Mapping[str, Any] | None = None, data: str = "-") -> RankFacts:
    """Describe this process.

    Args:
        world: the processes.
        config: the resolved configuration, plain values.
        data: fingerprint of the data.

    Returns:
        Its facts.
    """
    return RankFacts(
        rank=world.rank,
        host=socket.gethostname(),
        interface=local_address(world),
        device=_device(world.local_rank),
        versions=_versions(),
        config="-" if config is None else config_hash(config),
        data=data[:16],
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of a tree of plain values."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _device(local_rank: int) -> str:
    if not torch.cuda.is_available():
        return f"cpu {platform.machine()}"
    if local_rank >= torch.cuda.device_count():
        return f"no GPU {local_rank}: only {torch.cuda.device_count()} on this node"
    return torch.cuda.get_device_name(local_rank)


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in COMPARED_PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def differences(ranks: list[RankFacts]) -> list[str]:
    """One line for each fact that is not the same on all ranks."""
    lines = []
    for field in fields(RankFacts):
        values = [getattr(facts, field.name) for facts in ranks]
        if field.name in _SAME and len(set(values)) > 1:
            lines.append(f"{field.name}: {_who_has_what(values)}")
    return lines


def _who_has_what(values: list[str]) -> str:
    """For example: ``rank 0, 2 has A; rank 1 has B``, each value without what it shares with the first."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    parts = {value: value.split(", ") for value in holders}
    common = set.intersection(*(set(part) for part in parts.values()))
    return "; ".join(
        f"rank {', '.join(map(str, ranks))} has {', '.join(p for p in parts[value] if p not in common)}"
        for value, ranks in holders.items()
    )


def require_same(facts: RankFacts) -> list[RankFacts]:
    """Compare this process with the others; every rank must call it.

    Returns:
        The facts of all ranks.

    Raises:
        UserError: on every rank, if they differ.
    """
    ranks = gather(facts)
    if lines := differences(ranks):
        raise UserError(
            f"the ranks differ ({' | '.join(lines)}); expected the same on all; start every node from the same "
            "environment, with the same command and the same files"
        )
    return ranks
