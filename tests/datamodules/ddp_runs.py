"""Real `Trainer.fit` runs in several gloo processes, and a model whose weights are the ledger of what it was
trained on.

Processes are forked from multiprocessing's fork server, which has torch and Lightning loaded: a run costs its
steps, not its imports.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing as mp
import os
import signal
import socket
import tarfile
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from datamodules.base import ShardDataModule
from datamodules.shards.hashing import sample_seeds
from datamodules.shards.index import build_index
from datamodules.shards.manifest import Manifest
from qm_lightning.merging.noise import Noise
from qm_lightning.tokens import Tokens

SAMPLES = 50
SHARDS = (3, 10, 7, 1, 12, 5, 2, 10)
EPOCHS = 4  # that a ledger has room for


def write_numbers(root: Path, counts: tuple[int, ...] = SHARDS) -> Path:
    """Shards of uneven length; sample i has the key `k<i>` and says i."""
    root.mkdir(parents=True)
    number, entries = 0, []
    for shard, count in enumerate(counts):
        path = root / f"numbers-{shard:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                text = str(number).encode()
                member = tarfile.TarInfo(f"k{number:03d}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
                number += 1
        entries.append(build_index(path))
    Manifest(tuple(entries)).save(root)
    return root


def gumbel_of(seeds: torch.Tensor) -> list[list[float]]:
    """What a merger adds to the salience of two tokens of each sample."""
    mask = torch.ones(len(seeds), 2, dtype=torch.bool)
    return (
        Noise(3).gumbel(Tokens(mask[..., None].float(), mask, mask[..., None].long(), seeds=seeds)).tolist()
    )


class IdModule(ShardDataModule):
    """Samples are their own numbers; the augmentation is a draw from the sample's seed."""

    modality = "text"

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        return {"id": int(fields["txt"]), "augmented": float(np.random.RandomState(seed % 2**32).rand())}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "augmented": torch.tensor([s["augmented"] for s in samples], dtype=torch.float64),
        }


class InjectedError(RuntimeError):
    """The failure that a test asked for."""


@dataclass
class Stage:
    """One attempt at a run: what it is started with, and how it ends."""

    world: int = 1
    workers: int = 0
    batch: int = 4
    accumulate: int = 1
    fatal: int | None = None  # micro-batch (counted in this process) that is not survived
    how: str = "kill"  # "raise"; "kill one": rank 0; "save": after the optimizer step, then kill
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 1})
    data: dict[str, Any] = field(default_factory=dict)
    schedule: bool = False  # use trainer.estimated_stepping_batches
    callbacks: bool = True
    task: str = "fit"
    manual: bool = False  # manual optimisation, a step every second batch


class Ledger(pl.LightningModule):
    """Adds one to `seen[epoch * N + position]` for each sample whose gradient an optimizer step applied."""

    def __init__(self, log: Path, stage: Stage) -> None:
        super().__init__()
        self.seen = torch.nn.Parameter(torch.zeros(EPOCHS * SAMPLES))
        self.stage, self.log_path, self.count = stage, log, 0
        self.automatic_optimization = not stage.manual
        seed = stage.data.get("seed", 0)
        absolute = np.arange(EPOCHS * SAMPLES)
        seeds = sample_seeds(seed, absolute // SAMPLES, absolute % SAMPLES)
        self.slot = dict(zip(seeds.tolist(), absolute.tolist(), strict=True))

    def write(self, kind: str, batch: dict[str, Any]) -> None:
        line = {
            "kind": kind,
            "step": self.trainer.global_step,
            "ids": batch["id"][batch["valid"]].tolist(),
            "keys": [k for k, v in zip(batch["keys"], batch["valid"].tolist(), strict=True) if v],
            "seeds": batch["seeds"][batch["valid"]].tolist(),
            "position": batch["position"].tolist(),
            "augmented": batch["augmented"][batch["valid"]].tolist(),
            "gumbel": gumbel_of(batch["seeds"][batch["valid"]]),
            "progress": list(batch["progress"]),
            "weight": batch["weight"],
            "size": len(batch["valid"]),
        }
        with (self.log_path / f"rank{self.global_rank}.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.count == self.stage.fatal:
            self._fail()
        self.count += 1
        self.write("train", batch)
        slots = [self.slot[s] for s in batch["seeds"][batch["valid"]].tolist()]
        loss = -(self.seen[slots].sum() + 0 * self.seen.sum()) * self.stage.world * self.stage.accumulate
        if self.stage.manual:
            self._step(loss, batch_idx)
        return loss

    def _fail(self) -> None:
        if self.stage.how == "raise":
            raise InjectedError
        if self.stage.how == "kill" or (self.stage.how == "kill one" and self.global_rank == 0):
            os.kill(os.getpid(), signal.SIGKILL)

    def _step(self, loss: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(loss)
        if batch_idx % 2 or batch_idx + 1 == self.trainer.num_training_batches:
            optimizer.step()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The last hook before Lightning counts the batch as done: a signal handler may save here."""
        scheduler.step()
        if self.stage.how == "save" and self.count == self.stage.fatal:
            self.trainer.save_checkpoint(self.log_path / "checkpoints" / "signal.ckpt")
            os.kill(os.getpid(), signal.SIGKILL)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.write("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.write("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.write("predict", batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if not self.stage.schedule:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step <= steps else 0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _rank(rank: int, port: int, stage: Stage, root: str, out: Path, resume: str | None, answer: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(stage.world)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        answer.send(("done", _fit(stage, root, out, resume)))
    except BaseException as error:
        answer.send((type(error).__name__, f"{error}\n{traceback.format_exc()}"))


def _fit(stage: Stage, root: str, out: Path, resume: str | None) -> Any:
    # fork: these processes come from a fork server, and theirs would have to load torch anew
    data = IdModule(root, stage.batch, num_workers=stage.workers, **({"start_method": "fork"} | stage.data))
    saver = ModelCheckpoint(out / "checkpoints", "{step}", save_top_k=-1, **stage.checkpoint)
    strategy = DDPStrategy(process_group_backend="gloo") if stage.world > 1 else "auto"
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0} | stage.trainer
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=stage.world,
        strategy=strategy,
        accumulate_grad_batches=stage.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[saver, *(data.callbacks() if stage.callbacks else [])],
        **options,
    )
    out.mkdir(exist_ok=True, parents=True)
    module = Ledger(out, stage)
    getattr(trainer, stage.task)(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return {
        "seen": module.seen.detach().round().int().tolist(),
        "step": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.batch_progress.current.completed,
        "epoch": trainer.current_epoch,
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(
    stage: Stage, root: Path | str, out: Path, resume: Path | None = None, timeout: float = 90
) -> list[Any]:
    """Run a stage; of each rank its result, or (exception name, text), or None if it was killed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["datamodules.base", "lightning.pytorch.strategies", "torch.distributed"])
    port, ranks = _free_port(), []
    for rank in range(stage.world):
        receive, send = context.Pipe(duplex=False)
        arguments = (rank, port, stage, str(root), out, str(resume) if resume else None, send)
        process = context.Process(target=_rank, args=arguments)
        process.start()
        send.close()
        ranks.append((process, receive))
    return [_result(rank, process, receive, timeout) for rank, (process, receive) in enumerate(ranks)]


def _result(rank: int, process: Any, receive: Any, timeout: float) -> Any:
    """What a rank answered. Its data workers may hold the pipe open, so its end is watched, too."""
    try:
        if not wait([receive, process.sentinel], timeout):
            raise AssertionError(f"rank {rank} hangs")
        if not receive.poll(0):
            return None
        kind, result = receive.recv()
        return result if kind == "done" else (kind, result)
    except EOFError:
        return None
    finally:
        process.join(5)
        process.kill()


def logged(out: Path, world: int, kind: str = "train") -> list[list[dict[str, Any]]]:
    """What each rank wrote."""
    files = [out / f"rank{r}.jsonl" for r in range(world)]
    return [[e for e in map(json.loads, f.read_text().splitlines()) if e["kind"] == kind] for f in files]


def ledger_of(results: list[Any]) -> np.ndarray:
    """[epoch, position] -> times trained; the same on all ranks."""
    assert all(isinstance(r, dict) for r in results), results
    assert all(r == results[0] for r in results)
    return np.array(results[0]["seen"]).reshape(EPOCHS, SAMPLES)


def newest(out: Path) -> Path:
    """The last checkpoint."""
    return max((out / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
