"""The DataModule that all modalities share: loaders over ROOT/{train,val,test}, and exact resume."""

from __future__ import annotations

import hashlib
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.errors import DataError
from datamodules.processing.members import MemberDecode, stored_name
from datamodules.resumable import ResumableDataModule
from datamodules.shards.faults import FaultPolicy, OnError
from datamodules.shards.geometry import Geometry, Tail
from datamodules.shards.loader import StreamLoader
from datamodules.shards.order import OrderSettings
from datamodules.shards.resume import ExactResume
from datamodules.shards.source import Source, absence_of
from datamodules.shards.stream import Batch, Decode, StreamSpec

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


class ShardDataModule(ResumableDataModule[StreamLoader]):
    """Streams WebDataset shards, exactly resumable, to any LightningModule.

    Subclasses implement `decode`, `collate`, `decode_targets` and `describe_input`, and set `modality`,
    `vocab_size` and `eos_id`. Both `decode` and `collate` run in worker processes: they must not touch the
    trainer.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`, each with shards and their `index.json`.
        batch_size: samples of a batch on each rank.
        num_workers: worker processes per loader; 0 = in the training process.
        seed: of the order and of all per-sample random draws.
        shuffle: shuffle the training split.
        tail: what to do with the last, partial global batch of training: `pad` | `drop` | `carry`. Evaluation
            pads.
        on_error: bad samples in training: `skip` (masked, named in the log and counted, up to the budget) |
            `raise`.
        on_error_eval: the same in validation, test and prediction.
        max_bad: budget of `skip` per epoch, over all ranks.
        max_bad_share: the same as a share of the epoch; the smaller limit holds.
        window: samples shuffled among each other; 0 = full shuffle.
        slice_len: samples that stay neighbours before windows are shuffled.
        lanes: sequential streams an epoch is dealt from; for object stores a multiple of ranks x workers.
        bucket_batches: batches that are sorted by stored length among each other, to spare padding; 0 = off.
        persistent_workers: keep workers between epochs.
        start_method: `fork` | `spawn` | `forkserver`; `None`: the platform's.
        prefetch: batches that each worker makes ahead.
        pin_memory: page-locked batches, for GPUs.
        predict_split: split that `predict` reads.
        cache_dir: where shards of a URL are kept on this machine.
        cache_bytes: size limit of that directory.
        rename: for shards from elsewhere: their members' names by the names that are asked for here, such as
            `{"jpg": "image.jpg", "txt": "caption.txt"}`. Members that end in `.gz` are unpacked by themselves.
    """

    modality: ClassVar[str]
    vocab_size: int
    eos_id: int
    part_name: str | None = None
    """Name in a mixture, which then stands in every batch under `modality`."""
    required_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that every sample must have, by the manifest; a missing one is found before training."""

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        *,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "pad",
        on_error: OnError = "skip",
        on_error_eval: OnError = "raise",
        max_bad: int = 100,
        max_bad_share: float = 0.01,
        window: int = 16384,
        slice_len: int = 256,
        lanes: int = 1,
        bucket_batches: int = 0,
        persistent_workers: bool = False,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        predict_split: Split = "test",
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        rename: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.seed = str(root), batch_size, seed
        self.predict_split = predict_split
        self._tail, self._policy = tail, FaultPolicy(on_error, max_bad, max_bad_share)
        self._eval_policy = FaultPolicy(on_error_eval, max_bad, max_bad_share)
        self._rename = dict(rename or {})
        order = OrderSettings(
            seed=seed,
            shuffle=shuffle,
            window=window,
            slice_len=slice_len,
            lanes=lanes,
            unit=batch_size if lanes > 1 or bucket_batches else 1,
            bucket=bucket_batches * batch_size,
        )
        self._order = order
        self._workers: dict[str, Any] = {
            "num_workers": num_workers,
            "persistent_workers": persistent_workers,
            "start_method": start_method,
            "prefetch": prefetch,
            "pin_memory": pin_memory,
        }
        self._cache = (cache_dir, cache_bytes)
        self._sources: dict[str, Source | None] = {}
        self._group: Any = None

    # For subclasses -------------------------------------------------------------------------------------

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """Turn a stored sample into what `collate` takes. Runs in a worker.

        Args:
            fields: raw contents by field name (`jpg`, `txt`, ...).
            key: sample key.
            seed: what all random draws for this sample must follow from.

        Returns:
            Anything `collate` understands.

        Raises:
            Exception: of any type, if the sample is bad; `on_error` says what then happens.
        """
        raise NotImplementedError

    def decoder(self, training: bool) -> Decode:
        """How samples are read: by `decode`; a subclass may read those of an evaluation in another way."""
        return self.decode

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a batch. Runs in a worker; the stream adds the keys that all modalities share.

        Args:
            samples: B results of `decode`.

        Returns:
            At least `inputs` (dict of tensors) and `targets` (long [B,T], -100 = padding).
        """
        raise NotImplementedError

    def decode_targets(self, ids: Tensor) -> str:
        """Target tokens, long [T], as text."""
        raise NotImplementedError

    def describe_input(self, batch: Batch, i: int) -> Any:
        """Sample i for people: a float array [H,W] or [H,W,3] in [0,1], or one string per token."""
        raise NotImplementedError

    # Loaders --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Forget the state of a former run, and see that exact resume is possible."""
        super().setup(stage)
        self._group = None
        if stage == "fit" and not any(isinstance(c, ExactResume) for c in self._callbacks_in_use()):
            log.warning(
                "the Trainer lacks the exact-resume callback, so checkpoints from the middle of an epoch "
                "cannot be resumed: pass Trainer(callbacks=datamodule.callbacks())"
            )

    def train_dataloader(self) -> StreamLoader:
        """Batches of ROOT/train, in the seeded order of the epoch, resumable.

        Raises:
            DataError: there is no such split, or the shards changed since the checkpoint.
        """
        return self.resume(self._loader("train", self._tail))

    def endless_dataloader(self) -> StreamLoader:
        """Full batches of ROOT/train, pass after pass: a part of a mixture, which keeps the position."""
        return self._loader("train", "carry")

    def val_dataloader(self) -> StreamLoader | list[StreamLoader]:
        """All samples of ROOT/val, each once, over all ranks; nothing if there is no such split."""
        return self._loader("val") if self._source("val") is not None else []

    def test_dataloader(self) -> StreamLoader:
        """All samples of ROOT/test, each once, over all ranks."""
        return self._loader("test")

    def predict_dataloader(self) -> StreamLoader:
        """All samples of `predict_split`, each once; `position` tells their order."""
        return self._loader(self.predict_split)

    def _loader(self, split: Split, train_tail: Tail | None = None) -> StreamLoader:
        """A split's loader; with a tail: for training."""
        training = train_tail is not None
        source = self._source(split)
        if source is None:
            raise DataError(absence_of(self.root, split))
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        )
        order = self._order if training else OrderSettings(seed=self.seed, shuffle=False)
        spec = StreamSpec(
            shards=source.shards,
            locate=source.locate,
            settings=order,
            geometry=Geometry(source.total, self.batch_size, rank, world, train_tail or "pad"),
            decode=MemberDecode(self.decoder(training), self._rename),
            collate=self._collate,
        )
        return StreamLoader(
            spec,
            source.fingerprint,
            **self._workers,
            policy=self._policy if training else self._eval_policy,
            training=training,
            agree=self._agree if world > 1 and dist.is_initialized() else None,
        )

    def _collate(self, samples: list[dict[str, Any]]) -> Batch:
        batch = self.collate(samples)
        return batch if self.part_name is None else {**batch, "modality": self.part_name}

    def _source(self, split: Split) -> Source | None:
        if split not in self._sources:
            source = Source.open(f"{self.root.rstrip('/')}/{split}", *self._cache)
            if source is not None:
                stored = frozenset.intersection(*(frozenset(s.fields) for s in source.manifest.shards))
                source.require([stored_name(f, self._rename, stored) for f in self.required_fields])
            self._sources[split] = source
        return self._sources[split]

    def _agree(self, bad: int, failures: int) -> tuple[int, int]:
        """Sum fault counts over ranks on the CPU: no accelerator waits for it."""
        if self._group is None:
            timeout = getattr(self.trainer.strategy, "_timeout", None) if self.trainer is not None else None
            self._group = dist.new_group(backend="gloo", timeout=timeout or timedelta(minutes=30))
        counts = torch.tensor([bad, failures])
        dist.all_reduce(counts, group=self._group)
        bad, failures = counts.tolist()
        return bad, failures

    def fingerprint(self) -> str:
        """Identity of all shards of all splits, as hexadecimal SHA-256."""
        digest = hashlib.sha256()
        for split in ("train", "val", "test"):
            source = self._source(split)
            digest.update(f"{split}:{source.fingerprint if source else '-'};".encode())
        return digest.hexdigest()

    def _callbacks_in_use(self) -> list[Callback]:
        return list(self.trainer.callbacks) if self.trainer is not None else []  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """For workers: everything but the trainer and what belongs to it."""
        gone = ("trainer", "_train", "_state", "_group")
        return {**self.__dict__, **dict.fromkeys(gone)}
