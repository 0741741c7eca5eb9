"""Leaves a training in good order when the machine is taken away, or when the user stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from qm_lightning.callbacks.loop_state import (
    between_steps,
    flush_step_metrics,
    mark_validation_due,
    validation_follows,
)
from qm_lightning.errors import INTERRUPTED
from qm_lightning.runtime.checkpoint_io import AtomicCheckpointIO
from qm_lightning.runtime.rendezvous import cpu_group, gather
from qm_lightning.runtime.run_directory import RunDirectory
from qm_lightning.runtime.wandb_run import RunLogger
from qm_lightning.runtime.world import slurm_job_name

EXIT_CODE = 75  # EX_TEMPFAIL: try again later; never mistaken for success

# SIGUSR1 announces a time limit (SLURM's --signal): the job must ask for its next turn itself. SIGTERM comes
# with a pre-emption, after which SLURM requeues by itself, or with scancel: nobody wants the job back.
_INTERRUPT, _LEAVE, _LEAVE_AND_REQUEUE = 1, 2, 3
_MEANING = {signal.SIGINT: _INTERRUPT, signal.SIGTERM: _LEAVE, signal.SIGUSR1: _LEAVE_AND_REQUEUE}
_SAME_KEY_S = 1.0  # the terminal signals torchrun and the ranks, and torchrun signals the ranks


class Preempted(SystemExit):
    """Ends the process with exit code 75, or 130 after Ctrl-C, through every ``finally`` on the way."""


class PreemptionGuard(Callback):
    """A signal on any rank: every rank leaves at the same optimizer step, with a complete ``last.ckpt``.

    The handler only takes a note; a second Ctrl-C ends the process at once. Ranks compare notes over gloo, on the host:
    no GPU is waited for.

    Args:
        run: the run's directory.
        every: optimizer steps between two comparisons; ``None``: 1 on the CPU, 10 on accelerators.
    """

    def __init__(self, run: RunDirectory, every: int | None = None) -> None:
        self.path = run.checkpoints / "last.ckpt"
        self.every = every
        self._noted = 0
        self._interrupted_at: float | None = None
        self._speaks = False
        self._in_validation = False
        self._previous: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which would start a collective in the middle of whatever runs."""
        self._install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As above: a resumed training has no sanity check."""
        self._install(trainer)

    def _install(self, trainer: Trainer) -> None:
        if self._previous:
            return
        cpu_group()
        self._speaks = trainer.is_global_zero
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        # Lightning asks rank 0 before every batch, on the device; ours is the one question.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, _MEANING[signal.Signals(number)])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None and now - self._interrupted_at > _SAME_KEY_S:
            raise KeyboardInterrupt
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._speaks:
                line = b"\nCtrl-C: saving after this step; once more ends at once, without a save\n"
                os.write(2, line)  # print may be in the middle of another line, and refuses then
        self._note(number, frame)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave if any rank was told to; a validation that comes next is left from there."""
        if not between_steps(trainer):
            return
        every = self.every or (1 if trainer.strategy.root_device.type == "cpu" else 10)
        if trainer.global_step % every or validation_follows(trainer):
            return
        if verdict := self._compare_notes():
            trainer.save_checkpoint(self.path, weights_only=False)
            flush_step_metrics(trainer)
            self._leave(trainer, verdict)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before the first batch."""
        self._check_in_validation(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Leave between two batches; every rank has the same number of them."""
        self._check_in_validation(trainer)

    def _check_in_validation(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not between_steps(trainer):
            return
        if verdict := self._compare_notes():
            self._in_validation = True
            trainer.save_checkpoint(self.path, weights_only=False)
            self._leave(trainer, verdict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint from the middle of a validation repeats it."""
        if self._in_validation:
            mark_validation_due(checkpoint)

    def _compare_notes(self) -> int:
        group = cpu_group()
        if group is None:
            return self._noted
        note = torch.tensor(self._noted)
        dist.all_reduce(note, op=dist.ReduceOp.MAX, group=group)
        return int(note)

    def _leave(self, trainer: Trainer, verdict: int) -> None:
        what, code = ("interrupted", INTERRUPTED) if verdict == _INTERRUPT else ("pre-empted", EXIT_CODE)
        if trainer.is_global_zero:
            print(f"{what}: {self._saved(trainer)}, exit code {code}", flush=True)
            if verdict == _INTERRUPT:
                print("go on with the same command and --ckpt_path last", flush=True)
            if verdict == _LEAVE_AND_REQUEUE:
                requeue()
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger) and verdict != _INTERRUPT:
                    logger.mark_preempting()
        gather(None)  # nobody leaves, and makes the scheduler clear the job away, before rank 0 is done
        raise Preempted(code)

    def _saved(self, trainer: Trainer) -> str:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO) and io.failure is not None:
            return io.failure
        return f"saved step {trainer.global_step} to {self.path}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}


def requeue() -> None:
    """Ask SLURM to start the job again; says so if it refuses. Does nothing outside of SLURM."""
    job = slurm_job_name(os.environ)
    if not job:
        return
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False
        )
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(
            f"warning: scontrol requeue {job} failed: {problem}; submit it again", file=sys.stderr, flush=True
        )
    else:
        print(f"pre-empted: requeued SLURM job {job}", flush=True)
