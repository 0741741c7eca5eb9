"""Text from shards: a context as bytes or through a backbone's tokenizer, and a target as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from datamodules.base import ShardDataModule
from datamodules.errors import DataError
from datamodules.processing.context import text_reader
from datamodules.processing.fields import member
from datamodules.processing.targets import ByteTargets, pad_targets
from datamodules.shards.stream import Batch

CONTEXT_FIELD = "txt"
TARGET_FIELD = "target.txt"


class TextDataModule(ShardDataModule):
    """Contexts and their targets: bytes with an end byte (257 ids).

    Samples hold `txt`, the context, and `target.txt`; both UTF-8.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`.
        batch_size: samples of a batch on each rank.
        tokenizer: `bytes`, or folder or hub name of the backbone, whose own tokenizer then reads the context.
        context_length: longest context in tokens; of longer ones the end is kept.
        target_length: longest target in bytes, end byte included; the rest is cut off.
        download: fetch a tokenizer by its name, over the network.
        **stream: options of `ShardDataModule`.

    Raises:
        DataError: the tokenizer cannot be read, or a length is below 1.
    """

    modality: ClassVar[str] = "text"
    required_fields: ClassVar[tuple[str, ...]] = (CONTEXT_FIELD,)

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        *,
        tokenizer: str = "bytes",
        context_length: int = 256,
        target_length: int = 65,
        download: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(root, batch_size, **stream)
        if min(context_length, target_length) < 1:
            raise DataError(
                f"context_length is {context_length} and target_length {target_length}, expected 1 or more"
            )
        self.reader = text_reader(tokenizer, context_length, download)
        self._target_length = target_length
        self._vocabulary = ByteTargets()
        self.vocab_size, self.eos_id = self._vocabulary.vocab_size, self._vocabulary.eos_id

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """One sample: `context` as the reader takes it, `targets` long [T]."""
        target = member(fields, TARGET_FIELD, "another task for `prepare text`")
        context = self.reader.prepare(fields[CONTEXT_FIELD])
        return {"context": context, "targets": self._vocabulary.encode(target)}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """`inputs`: `input_ids` long [B,N], `attention_mask` long [B,N]; `targets` long [B,T]."""
        return {
            "inputs": self.reader.batch([s["context"] for s in samples]),
            "targets": pad_targets([s["targets"] for s in samples], self._target_length),
        }

    def decode_targets(self, ids: Tensor) -> str:
        """Text of target bytes, long [T]."""
        return self._vocabulary.decode(ids)

    def describe_input(self, batch: Batch, i: int) -> list[str]:
        """Tokens of sample i as strings, padding left out."""
        kept = batch["inputs"]["attention_mask"][i].bool()
        return self.reader.tokens(batch["inputs"]["input_ids"][i][kept])
