"""Small real trainings with everything that is always on, in processes that behave as a launcher's.

The processes are forked from a fork server that has torch and Lightning loaded: a run costs its steps, not its
imports. `Attempt` says what is started and how it ends; each rank writes what it computed to a trace.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import multiprocessing as mp
import os
import resource
import signal
import socket
import sys
import tarfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from nodes import descendants
from torch.distributed.tensor import DTensor

from datamodules.base import ShardDataModule
from datamodules.shards.index import build_index
from datamodules.shards.manifest import Manifest
from qm_lightning.errors import UserError
from qm_lightning.modules.muon import MuonWithAdamW
from qm_lightning.runtime.assemble import always_on_callbacks, trainer_arguments
from qm_lightning.runtime.collective_timeout import TIMEOUT_VARIABLE
from qm_lightning.runtime.frozen import FrozenBackboneMixin
from qm_lightning.runtime.loggers import TrackingOptions, make_loggers
from qm_lightning.runtime.rank_facts import collect_facts, require_same
from qm_lightning.runtime.run_directory import open_run_directory
from qm_lightning.runtime.sharded import shard_trainable
from qm_lightning.runtime.world import resolve_world

SAMPLES, WIDTH = 40, 8
HANGS_AFTER_S = (
    240.0  # a rank computes for two seconds; on a machine that is busy with other work it waits long
)


def write_shards(root: Path) -> Path:
    """Three splits of numbered samples, two uneven shards each."""
    for split in ("train", "val"):
        folder, number, entries = root / split, 0, []
        folder.mkdir(parents=True)
        for shard, count in enumerate((17, SAMPLES - 17)):
            path = folder / f"{split}-{shard:03d}.tar"
            with tarfile.open(path, "w") as tar:
                for _ in range(count):
                    member = tarfile.TarInfo(f"k{number:03d}.txt")
                    text = str(number).encode()
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text))
                    number += 1
            entries.append(build_index(path))
        Manifest(tuple(entries)).save(folder)
    return root


class Numbers(ShardDataModule):
    """A sample is a fixed random vector that follows from its number."""

    modality = "text"

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        number = int(fields["txt"])
        vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
        return {"id": number, "vector": vector, "draw": seed % 1000 / 1000}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "vector": torch.stack([s["vector"] for s in samples]),
            "draw": torch.tensor([s["draw"] for s in samples]),
        }


class Frozen(torch.nn.Module):
    """Stands for a frozen backbone: it has weights and a fingerprint."""

    name_or_path = "tiny"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)), requires_grad=False
        )

    def fingerprint(self) -> str:
        return f"{self.weight.double().sum().item():.12f}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


@dataclass
class Attempt:
    """One start of a training, and how it ends."""

    world: int = 1
    workers: int = 0
    batch: int = 4
    accumulate: int = 1
    max_steps: int = 12
    trainer: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.05
    muon: bool = False  # for the merger's matrix
    checkpoint_every: int = 1000
    ckpt_path: str | None = None
    fresh: bool = False
    policy: Any = "exact"
    signal_at: tuple[int, int] | None = None  # (training batch, rank): raise `signal` there
    signal_in_validation: tuple[int, int] | None = None  # (training batches before it, validation batch)
    signal: int = signal.SIGTERM
    to_all: bool = False  # to the processes below it too, as SLURM, torchrun and Ctrl-C do
    signal_again_after_s: float | None = None
    nan_at: tuple[int, int] | None = None  # (training batch, rank)
    strategy: str = "auto"
    backbone: int = 0
    dropout: float = 0.3
    noise: float = 0.1
    tracking: dict[str, Any] = field(default_factory=lambda: {"wandb": False})
    timeout_s: int | None = None  # of collectives
    absent: int | None = None  # rank that is never started
    odd: int | None = None  # rank with another configuration
    blind: int | None = None  # rank that sees an empty folder where the others see the run
    env: dict[str, str] = field(default_factory=dict)
    file_limit: int | None = None  # bytes beyond which the kernel refuses to write a file
    # (training batch, rank): stop the process, as a lost network would
    stop_at: tuple[int, int] | None = None
    fill_disk_at: int | None = None  # training batch: from then on the run directory's disk has no room
    launcher: str = "torchrun"
    config: dict[str, Any] = field(default_factory=dict)


class Learner(FrozenBackboneMixin, pl.LightningModule):
    """Frozen part, dropout, Gumbel noise, a running controller in a buffer: all that a resume can get wrong."""

    def __init__(self, trace: Path, attempt: Attempt) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = Frozen(attempt.backbone)
        self.merger = torch.nn.Linear(WIDTH, WIDTH)
        self.prior = torch.nn.Linear(WIDTH, 1)
        self.register_buffer("rho", torch.zeros(()))
        self.attempt, self.trace, self.batches = attempt, trace, 0

    def configure_model(self) -> None:
        shard_trainable(self)

    def write(self, **line: Any) -> None:
        with (self.trace / f"rank{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        hidden = self.merger(self.backbone(batch["vector"]))
        noise = -torch.log(-torch.log(torch.rand_like(hidden).clamp(1e-6, 1 - 1e-6)))
        self.first_noise = noise.flatten()[0].item()
        hidden = F.dropout(hidden + self.attempt.noise * noise, self.attempt.dropout, self.training)
        return self.prior(hidden).squeeze(1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        valid = batch["valid"].float()
        error = (self(batch) - batch["draw"] - batch["id"] / SAMPLES) ** 2
        loss = (error * valid).sum() / valid.sum().clamp(min=1) * batch["weight"]
        with torch.no_grad():
            self.rho += 0.1 * (valid.sum() - self.rho)
        self._happen()
        self.write(
            kind="train",
            step=self.trainer.global_step,
            ids=batch["id"][batch["valid"]].tolist(),
            loss=loss.item(),
            rho=self.rho.item(),
            noise=self.first_noise,
            rate=self.trainer.optimizers[0].param_groups[0]["lr"],
        )
        self.batches += 1
        self.log("train/loss/total", loss.detach(), batch_size=len(valid))
        return loss * float("nan") if self._now(self.attempt.nan_at) else loss

    def _now(self, when: tuple[int, int] | None) -> bool:
        return when is not None and when[0] == self.batches - 1 and when[1] == self.global_rank

    def _happen(self) -> None:
        if self.attempt.signal_at == (self.batches, self.global_rank):
            for process in [os.getpid(), *(descendants(os.getpid()) if self.attempt.to_all else [])]:
                with suppress(ProcessLookupError):  # a child of one that has just ended
                    os.kill(process, self.attempt.signal)
            if self.attempt.signal_again_after_s is not None:
                time.sleep(self.attempt.signal_again_after_s)
                os.kill(os.getpid(), self.attempt.signal)
        if self.attempt.stop_at == (self.batches, self.global_rank):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.attempt.fill_disk_at == self.batches:
            fill_disk(Path(self.trainer.default_root_dir))

    def on_validation_epoch_start(self) -> None:
        self.total, self.count = torch.zeros(()), torch.zeros(())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if (
            self.attempt.signal_in_validation == (self.batches, batch_idx)
            and not self.trainer.sanity_checking
        ):
            os.kill(os.getpid(), self.attempt.signal)
        valid = batch["valid"].float()
        self.total += ((self(batch) - batch["id"] / SAMPLES) ** 2 * valid).sum()
        self.count += valid.sum()

    def on_validation_epoch_end(self) -> None:
        both = torch.stack([self.total, self.count])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(both)
        score = both[0] / both[1].clamp(min=1)
        self.log("val/quality/nats", score, rank_zero_only=False, sync_dist=False)
        if not self.trainer.sanity_checking:
            self.write(kind="val", step=self.trainer.global_step, score=score.item())

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        rate = self.attempt.learning_rate
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable, lr=rate)
        if self.attempt.muon:
            rest = [{"params": [p for p in trainable if p is not self.merger.weight]}]
            optimizer = MuonWithAdamW([self.merger.weight], rest, rate, rate, 0.01, (0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.attempt.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fill_disk(folder: Path) -> None:
    """Write a file until nothing fits any more; `filler` may be removed again."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def fit(attempt: Attempt, data_root: str, run_dir: Path, trace: Path) -> dict[str, Any]:
    """Open the run directory and train, as the command line does."""
    trace.mkdir(parents=True, exist_ok=True)
    run = open_run_directory(
        str(run_dir), "tiny", ckpt_path=attempt.ckpt_path, fresh=attempt.fresh, policy=attempt.policy
    )
    config = {"learning_rate": attempt.learning_rate, **attempt.config}
    world = resolve_world(os.environ)
    if world.size > 1:
        require_same(collect_facts(world, {"odd": world.rank == attempt.odd}))
    run.write_config(config)
    data = Numbers(data_root, attempt.batch, num_workers=attempt.workers, seed=3, start_method="fork")
    options: dict[str, Any] = {
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    } | attempt.trainer
    trainer = pl.Trainer(
        default_root_dir=str(run.path),
        accelerator="cpu",
        max_steps=attempt.max_steps,
        accumulate_grad_batches=attempt.accumulate,
        logger=make_loggers(run, "tiny", TrackingOptions(**attempt.tracking), config),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *always_on_callbacks(run, seed=11, checkpoint_every=attempt.checkpoint_every),
            *data.callbacks(),
        ],
        **options,
        **trainer_arguments({"accelerator": "cpu", "strategy": attempt.strategy}),
    )
    module = Learner(trace, attempt)
    began = time.time()
    trainer.fit(module, datamodule=data, ckpt_path=run.ckpt_path, weights_only=True)
    return {
        "state": {name: whole(tensor).tolist() for name, tensor in module.state_dict().items()},
        "moments": [
            [whole(value).tolist() for value in state.values()]
            for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "step": trainer.global_step,
        "run_id": run.run_id,
        "seconds": time.time() - began,
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All shards of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass
class Outcome:
    """How one rank ended: its result, or its exit code, and what it printed."""

    result: dict[str, Any] | None
    code: int | None
    text: str
    seconds: float = 0.0

    @property
    def error(self) -> str:
        """The user's mistake that ended it."""
        assert "UserError: " in self.text, self.text
        return self.text.rsplit("UserError: ", 1)[1]


def _environment(attempt: Attempt, rank: int, port: int) -> dict[str, str]:
    if attempt.launcher == "slurm":
        return {
            "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(attempt.world),
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": str(attempt.world), "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_NODELIST": "127.0.0.1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if attempt.world == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(attempt.world),
        "LOCAL_WORLD_SIZE": str(attempt.world), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def _rank(rank: int, port: int, attempt: Attempt, data: str, run_dir: Path, trace: Path, answer: Any) -> None:
    os.environ |= _environment(attempt, rank, port) | attempt.env
    if attempt.timeout_s is not None:
        os.environ[TIMEOUT_VARIABLE] = str(attempt.timeout_s)
    if attempt.blind is not None:  # a relative path, which means another place on that rank
        place = run_dir.parent / ("elsewhere" if attempt.blind == rank else "")
        place.mkdir(exist_ok=True)
        os.chdir(place)
        run_dir = Path(run_dir.name)
    if attempt.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (attempt.file_limit, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    text, result = io.StringIO(), None
    code: int | None = 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            result = fit(attempt, data, run_dir, trace)
        except UserError as error:
            code = 2
            print(f"UserError: {error}", end="")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            code = 1
            traceback.print_exc()
    atexit._run_exitfuncs()  # as any process ends, and those of multiprocessing do not: W&B sends its last rows
    answer.send((result, code, text.getvalue()))
    sys.exit(code)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(
    attempt: Attempt,
    data: Path,
    run_dir: Path,
    trace: Path,
    timeout: float = HANGS_AFTER_S,
    wait_for: int | None = None,
) -> list[Outcome]:
    """Start every rank, wait for all (or the first so many, and kill the rest); fails if one hangs."""
    context = mp.get_context("forkserver")
    # Installed packages only: the fork server of Python 3.11 does not know the tests' folders.
    context.set_forkserver_preload(
        ["datamodules.base", "qm_lightning.runtime.assemble", "qm_lightning.runtime.loggers"]
    )
    port, began, ranks = free_port(), time.time(), []
    for rank in range(attempt.world):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, port, attempt, str(data), run_dir, trace, send))
        if rank != attempt.absent:
            process.start()
            ranks.append((process, receive))
        send.close()
    try:
        return [_outcome(rank, *pair, timeout, began) for rank, pair in enumerate(ranks[:wait_for])]
    finally:
        for process, _ in ranks:
            process.kill()


def _outcome(rank: int, process: Any, receive: Any, timeout: float, began: float) -> Outcome:
    try:
        if not wait([receive, process.sentinel], timeout):
            raise AssertionError(f"rank {rank} hangs")
        if not receive.poll(0):
            process.join(5)
            return Outcome(None, process.exitcode, "", time.time() - began)
        result, code, text = receive.recv()
        return Outcome(result, code, text, time.time() - began)
    except EOFError:
        process.join(5)
        return Outcome(None, process.exitcode, "", time.time() - began)
    finally:
        process.join(5)
        process.kill()


def traced(trace: Path, rank: int = 0, kind: str = "train") -> list[dict[str, Any]]:
    """What a rank computed, line by line."""
    path = trace / f"rank{rank}.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return [line for line in lines if line["kind"] == kind]
