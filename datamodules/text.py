"""Text from shards: a context as bytes or through a backbone's tokenizer, and a target as bytes or itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from datamodules.base import ShardDataModule
from datamodules.errors import DataError
from datamodules.processing.context import checked_text, text_reader
from datamodules.processing.fields import member
from datamodules.processing.targets import PADDING, ByteTargets, pad_targets
from datamodules.processing.tokenizer import BYTES
from datamodules.shards.stream import Batch

CONTEXT_FIELD = "txt"
TARGET_FIELD = "target.txt"
_NO_LIMIT = 2**31 - 1  # tokens


class TextDataModule(ShardDataModule):
    """Contexts and their targets: bytes with an end byte (257 ids), or the context's own tokens.

    Samples hold `txt`, the context, and `target.txt`; both UTF-8. `targets="text"` needs `txt` alone.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`.
        batch_size: samples of a batch on each rank.
        tokenizer: `bytes`, or folder or hub name of the backbone, whose own tokenizer then reads the context;
            `None`: bytes, but on the command line the backbone's own tokenizer where it has one.
        context_length: longest context in tokens; of longer ones the end is kept.
        target_length: longest target in bytes, end byte included; the rest is cut off.
        targets: `stored`: the target is `target.txt`; `text`: the text itself, token for token, for models that
            predict all of it (StreamingModule). No end token follows: a passage ends anywhere.
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
        tokenizer: str | None = None,
        context_length: int = 256,
        target_length: int = 65,
        targets: Literal["stored", "text"] = "stored",
        download: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(root, batch_size, **stream)
        if min(context_length, target_length) < 1:
            raise DataError(
                f"context_length is {context_length} and target_length {target_length}, expected 1 or more"
            )
        tokenizer = tokenizer or BYTES
        self.reader = text_reader(tokenizer, context_length, download)
        self.context_length, self._target_length = context_length, target_length
        self._tokenizer, self._download = tokenizer, download
        self._text_alone = targets == "text"
        self._vocabulary = ByteTargets()
        self.vocab_size, self.eos_id = self._vocabulary.vocab_size, self._vocabulary.eos_id
        if self._text_alone:
            self.vocab_size, self.eos_id = self.reader.vocab_size, self.reader.eos_id

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """One sample: `context` as the reader takes it, and `targets` long [T] where they are stored."""
        if self._text_alone:
            return {"context": self.reader.prepare(fields[CONTEXT_FIELD])}
        target = member(fields, TARGET_FIELD, "another task for `prepare text`")
        checked_text(target)
        context = self.reader.prepare(fields[CONTEXT_FIELD])
        return {"context": context, "targets": self._vocabulary.encode(target)}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """`inputs`: `input_ids` long [B,N], `attention_mask` long [B,N]; `targets` long [B,T]."""
        inputs = self.reader.batch([s["context"] for s in samples])
        if self._text_alone:
            targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, PADDING)
        else:
            targets = pad_targets([s["targets"] for s in samples], self._target_length)
        return {"inputs": inputs, "targets": targets}

    def decode_targets(self, ids: Tensor) -> str:
        """Text of target ids, long [T]."""
        return self.reader.decode(ids) if self._text_alone else self._vocabulary.decode(ids)

    def whole(self, text: bytes) -> Tensor:
        """Token ids of one text however long it is, long [N], as the context's reader gives them.

        Raises:
            DataError: it is empty or not UTF-8.
        """
        reader = text_reader(self._tokenizer, _NO_LIMIT, self._download)
        return reader.batch([reader.prepare(text)])["input_ids"][0]

    def describe_input(self, batch: Batch, i: int) -> list[str]:
        """Tokens of sample i as strings, padding left out."""
        kept = batch["inputs"]["attention_mask"][i].bool()
        return self.reader.tokens(batch["inputs"]["input_ids"][i][kept])
