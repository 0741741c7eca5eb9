"""The directory of a run: where it lies, whether it has a past, and what to continue from."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from qm_lightning.errors import UserError
from qm_lightning.runtime.config_diff import describe_changes
from qm_lightning.runtime.find_checkpoint import StoredRun, has_history, resolve_checkpoint
from qm_lightning.runtime.rendezvous import gather, join, on_rank_zero
from qm_lightning.runtime.run_lock import hold
from qm_lightning.runtime.world import World, resolve_world

Policy = Literal["exact", "weights", "new_schedule"]

RUNS = Path("runs")
MANIFEST = "run.json"
# What a run leaves behind; `--fresh` puts it aside.
_HISTORY = ("checkpoints", "metrics.csv", "wandb", "config.yaml", MANIFEST, "report", "results.json")


@dataclass(frozen=True)
class RunDirectory:
    """An opened run directory, the same on every rank.

    Attributes:
        path: the directory; holds config.yaml, checkpoints/, metrics.csv, wandb/, report/.
        run_id: the run's id in W&B, made before training and kept for its whole life.
        ckpt_path: the checkpoint that Lightning restores; ``None``: none.
        initial_weights: the checkpoint of which only the weights are taken (policy ``weights``).
        step: optimizer steps behind ``ckpt_path``; 0 without one.
        policy: what a checkpoint restores.
        stored_config: the configuration kept in the checkpoint, empty without one.
    """

    path: Path
    run_id: str
    ckpt_path: str | None = None
    initial_weights: str | None = None
    step: int = 0
    policy: Policy = "exact"
    stored_config: dict[str, Any] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def write_config(self, config: dict[str, Any]) -> None:
        """Keep the resolved configuration of a training, on rank 0; print what a resume changes.

        Args:
            config: the whole tree, plain values.
        """
        if resolve_world(os.environ).rank != 0:
            return
        if self.stored_config and (line := describe_changes(self.stored_config, config)):
            print(line, flush=True)
        with _writable(self.path):
            write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def written_config(self) -> dict[str, Any]:
        """What the last training kept by ``write_config``; empty if none did."""
        file = self.path / "config.yaml"
        return yaml.safe_load(file.read_text()) if file.is_file() else {}


def write_text(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old or the new file, never half of one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into the user's error that it is."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in {path}: {error.strerror}; expected a directory with room that this process may "
            "write; free some space, or give another --run_dir"
        ) from error


def open_run_directory(
    run_dir: str | None,
    name: str,
    *,
    verb: str = "fit",
    ckpt_path: str | None = None,
    fresh: bool = False,
    policy: Policy = "exact",
    accelerator: str = "auto",
) -> RunDirectory:
    """Find or make the run's directory; rank 0 decides, all ranks agree.

    A launcher's restart (torchrun, SLURM requeue) of the same job goes on from ``last`` by itself.

    Args:
        run_dir: the exact directory; ``None``: ``runs/NAME/VERSION``, a new version for a new training, the
            newest one otherwise.
        name: the experiment.
        verb: ``fit`` makes directories; the others want one that exists.
        ckpt_path: ``last``, ``best`` or a file; evaluation takes ``best``, else ``last``, by default.
        fresh: put a past of the directory aside (into ``previous/``) and start from zero.
        policy: ``exact`` restores everything, ``weights`` starts a new run from the weights, ``new_schedule``
            restores all but the learning-rate schedule.
        accelerator: ``trainer.accelerator``, for the process group.

    Returns:
        The directory.

    Raises:
        UserError: a past that neither ``--ckpt_path`` nor ``--fresh`` explains, no checkpoint that loads, another
            training in the same directory, or a directory that some rank does not see.
    """
    world = resolve_world(os.environ)
    join(world, accelerator)
    if verb == "fit":

        def open_it() -> RunDirectory:
            with _writable(Path(run_dir or RUNS / name)):
                return _open_for_training(run_dir, name, ckpt_path, fresh, policy, world)

        run = on_rank_zero(open_it)
    else:
        run = on_rank_zero(lambda: _open_for_evaluation(run_dir, name, ckpt_path))
    _seen_by_all(run)
    return run


def _open_for_training(
    run_dir: str | None, name: str, ckpt_path: str | None, fresh: bool, policy: Policy, world: World
) -> RunDirectory:
    restarted = _restarted_directory(run_dir, name, world)
    if restarted is not None:
        return _continue_restarted(restarted, policy, world)
    if ckpt_path is None:
        if policy != "exact":
            raise UserError(
                f"found --resume_policy {policy} without --ckpt_path; expected a checkpoint; name one"
            )
        return _start(run_dir, name, fresh, world)
    if fresh:
        raise UserError("found --fresh and --ckpt_path; expected one of them; a fresh start loads nothing")
    source = Path(run_dir) if run_dir else _newest_version(name)
    if source is not None and source.is_dir() and policy != "weights":
        hold(source)
    stored = resolve_checkpoint(source or RUNS / name, ckpt_path)
    if policy == "weights":
        run = _start(run_dir, name, fresh, world)
        return replace(run, initial_weights=str(stored.path), policy=policy)
    if source is None or (not run_dir and ckpt_path not in ("last", "best")):
        source = _new_version(name)
    return _resume(source, stored, policy, world)


def _start(run_dir: str | None, name: str, fresh: bool, world: World) -> RunDirectory:
    path = Path(run_dir) if run_dir else _new_version(name)
    path.mkdir(parents=True, exist_ok=True)
    if has_history(path) and not fresh:
        raise UserError(
            f"{path} holds an earlier training; expected an empty directory for a start from zero; "
            "add --ckpt_path last to go on with it, or --fresh to put it aside"
        )
    hold(path)
    if has_history(path):
        _put_aside(path)
    # A W&B sweep gives its runs their ids.
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    _write_manifest(path, run_id, world)
    return RunDirectory(path, run_id)


def _resume(path: Path, stored: StoredRun, policy: Policy, world: World) -> RunDirectory:
    path.mkdir(parents=True, exist_ok=True)
    run_id = _read_manifest(path).get("run_id") or stored.record.get("run_id") or secrets.token_hex(4)
    _write_manifest(path, str(run_id), world)
    print(f"resume: step {stored.step} from {stored.path}", flush=True)
    return RunDirectory(
        path,
        str(run_id),
        ckpt_path=str(stored.path),
        step=stored.step,
        policy=policy,
        stored_config=stored.record.get("config") or {},
    )


def _open_for_evaluation(run_dir: str | None, name: str, ckpt_path: str | None) -> RunDirectory:
    path = Path(run_dir) if run_dir else _newest_version(name)
    if ckpt_path not in (None, "last", "best"):
        stored = resolve_checkpoint(RUNS, str(ckpt_path))
        path = path or stored.path.resolve().parent.parent
    elif path is None or not path.is_dir():
        raise UserError(
            f"no run in {path or RUNS / name}; expected a trained one; give --run_dir or train first"
        )
    else:
        has_best = (path / "checkpoints" / "best.ckpt").is_file()
        stored = resolve_checkpoint(path, ckpt_path or ("best" if has_best else "last"))
    path.mkdir(parents=True, exist_ok=True)
    run_id = _read_manifest(path).get("run_id") or stored.record.get("run_id") or secrets.token_hex(4)
    return RunDirectory(path, str(run_id), ckpt_path=str(stored.path), step=stored.step)


def _continue_restarted(path: Path, policy: Policy, world: World) -> RunDirectory:
    hold(path)  # the process that was told to leave may still be saving
    if not any((path / "checkpoints").glob("*.ckpt")):
        print(
            f"restart: {world.launch_id or world.launcher} had saved nothing in {path}; from zero", flush=True
        )
        run_id = str(_read_manifest(path).get("run_id") or secrets.token_hex(4))
        _put_aside(path)
        _write_manifest(path, run_id, world)
        return RunDirectory(path, run_id)
    # The new schedule, if one was asked for, came with the first start; from then on the restart is exact.
    return _resume(path, resolve_checkpoint(path, "last"), "exact" if policy == "weights" else policy, world)


def _restarted_directory(run_dir: str | None, name: str, world: World) -> Path | None:
    """The directory that an earlier attempt of the same job used, if the launcher has restarted it."""
    candidates = [Path(run_dir)] if run_dir else sorted((RUNS / name).glob("*"), reverse=True)
    for path in candidates:
        manifest = _read_manifest(path)
        same_job = world.launch_id is not None and manifest.get("launch_id") == world.launch_id
        if manifest and (same_job or (world.restarts > 0 and world.launch_id is None)):
            return path
    return None


def _newest_version(name: str) -> Path | None:
    versions = sorted(path for path in (RUNS / name).glob("*") if path.is_dir() and path.name.isdigit())
    return versions[-1] if versions else None


def _new_version(name: str) -> Path:
    newest = _newest_version(name)
    number = 0 if newest is None else int(newest.name) + 1
    while True:
        path = RUNS / name / f"{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another training took it
            number += 1
            continue
        return path


def _put_aside(path: Path) -> None:
    target = path / "previous" / time.strftime("%Y%m%d-%H%M%S")
    while target.exists():
        target = target.with_name(target.name + "+")
    target.mkdir(parents=True)
    for name in _HISTORY:
        if (path / name).exists():
            (path / name).rename(target / name)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_manifest(path: Path, run_id: str, world: World) -> None:
    write_text(path / MANIFEST, json.dumps({"run_id": run_id, "launch_id": world.launch_id}, indent=2) + "\n")


def _seen_by_all(run: RunDirectory) -> None:
    """Every rank must read the same files: a node-local directory would start some ranks from zero."""
    wanted = [path for path in (str(run.path), run.ckpt_path, run.initial_weights) if path is not None]
    missing = gather([path for path in wanted if not Path(path).exists()])
    blind = [rank for rank, paths in enumerate(missing) if paths]
    if blind:
        raise UserError(
            f"rank {', '.join(map(str, blind))} does not see {missing[blind[0]][0]}; expected storage that "
            "every node shares; put --run_dir there"
        )
