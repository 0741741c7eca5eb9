"""Pictures and their texts from shards: the caption is the target, a question about the picture is context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from datamodules.errors import DataError
from datamodules.pixel_base import PixelDataModule
from datamodules.processing.context import text_reader
from datamodules.processing.fields import CAPTION_FIELD, QUESTION_FIELD, read_picture
from datamodules.processing.pixel_config import pixel_transform
from datamodules.processing.targets import ByteTargets
from datamodules.processing.tokenizer import BYTES, TokenTargets, text_targets
from datamodules.shards.decode import decode_field
from datamodules.shards.stream import Batch


class PairedDataModule(PixelDataModule):
    """Pictures, their captions as targets, and questions as the context that a merger may read.

    Samples hold a `png`, `jpg` or `jpeg` and a caption: `txt`, or an entry of `json`; `question.txt` if there are
    questions.

    Args:
        root: directory or URL with `train/`, `val/`, `test/`.
        batch_size: samples of a batch on each rank.
        processor: folder or hub name of the backbone: its `preprocessor_config.json` prepares the pixels.
        size: without a processor: (height, width) in pixels, one number for a square.
        mean: without a processor: what is taken off the pixels in [0,1], one number for all channels.
        std: without a processor: what the pixels are then divided by.
        channels: without a processor: 1 (grey) or 3 (RGB).
        caption: `txt`, or the entry of `json` that holds the caption.
        caption_tokenizer: `bytes` (257 ids), or folder, `tokenizer.json` or hub name of any tokenizer.
        target_length: longest caption in tokens, end token included; the rest is cut off.
        question_tokenizer: reads questions for the model that encodes them; like `caption_tokenizer`.
        question_length: longest question in tokens; of longer ones the end is kept.
        download: fetch processor and tokenizers by their names, over the network.
        **stream: options of `ShardDataModule`.

    Raises:
        DataError: neither or both of processor and size, or something cannot be read.
    """

    modality: ClassVar[str] = "paired"
    _vocabulary: ByteTargets | TokenTargets

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        *,
        processor: str | None = None,
        size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        channels: int = 3,
        caption: str = CAPTION_FIELD,
        caption_tokenizer: str = BYTES,
        target_length: int = 64,
        question_tokenizer: str = BYTES,
        question_length: int = 64,
        download: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(root, batch_size, **stream)
        self.pixels = pixel_transform(processor, size, mean, std, channels, download)
        self._caption, self._target_length = caption, target_length
        self._vocabulary = text_targets(caption_tokenizer, download)
        self.vocab_size, self.eos_id = self._vocabulary.vocab_size, self._vocabulary.eos_id
        self.questions = text_reader(question_tokenizer, question_length, download)

    def decode(self, fields: dict[str, bytes], key: str, seed: int) -> dict[str, Any]:
        """One pair: `pixels` uint8 [C,H,W], `targets` long [T], `question` where one is stored."""
        pixels = self.pixels.pixels(read_picture(fields))
        sample: dict[str, Any] = {"pixels": pixels, "targets": self._vocabulary.encode(self._text(fields))}
        if QUESTION_FIELD in fields:
            sample["question"] = self.questions.prepare(fields[QUESTION_FIELD])
        return sample

    def _text(self, fields: dict[str, bytes]) -> bytes:
        if self._caption == CAPTION_FIELD:
            text = decode_field(CAPTION_FIELD, fields[CAPTION_FIELD]) if CAPTION_FIELD in fields else None
        else:
            stored = decode_field("json", fields["json"]) if "json" in fields else {}
            text = stored.get(self._caption) if isinstance(stored, dict) else None
        if isinstance(text, str) and not text.strip():
            raise DataError(f"the caption {self._caption!r} is empty, expected at least one character")
        if not isinstance(text, str):
            found = ", ".join(sorted(fields))
            raise DataError(
                f"the sample has no caption {self._caption!r} among {found}; expected a txt member, or caption=the "
                "name of a text in the json member"
            )
        return text.encode()

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """`inputs.pixel_values` float [B,C,H,W], `targets` long [B,T]; `context`: the questions, if any.

        `context` has `input_ids` and `attention_mask`, long [B,N] each.
        """
        batch = super().collate(samples)
        if all("question" in s for s in samples):
            batch["context"] = self.questions.batch([s["question"] for s in samples])
        return batch
