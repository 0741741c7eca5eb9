"""A frozen Hugging Face encoder of text, pictures or clips: ``Tokens`` with exact attention statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import Cache

from qm_lightning.backbones.layout import (
    Modality,
    attention_modules,
    choose_layers,
    counts_positions,
    find_max_tokens,
    find_modality,
    find_sample_tokens,
    grid_positions,
    patch_grid,
)
from qm_lightning.backbones.loading import find_source, load_encoder, read_json, unseen, weights_fingerprint
from qm_lightning.backbones.recording import Record, recording
from qm_lightning.errors import UserError
from qm_lightning.tokens import AttentionStats, Tokens


class HFBackbone(nn.Module):
    """A pre-trained transformer, frozen for certain: always in eval mode, no gradient, no autocast.

    ``values`` is the model's last hidden state. ``metric`` is the mean over heads of the last chosen layer's
    keys, as its attention sees them (rotated, where the model uses RoPE). A text may be padded on either
    side. An image model takes clips too, frame by frame.

    Args:
        name_or_path: folder written by ``save_pretrained``, or a model's name in the Hugging Face cache.
        layers: layers to take statistics from: that many, spread evenly, or indices.
        received: compute received attention (not causal) for every merger; one that goes by it turns this on.
        special_tokens: class, distillation and register tokens that the model adds to a picture: ``drop``
            them, or keep and ``protect`` them, placed in the middle of the grid. Text: every token is kept;
            ``protect`` protects those that begin and end a text.
        dtype: of weights and values: ``float32`` (default), ``bfloat16``, ``float16``, ``float64``.
        download: allow the network, to fetch a model by its name.

    Attributes:
        hidden_size: width D of the values.
        layers: indices of the chosen layers.
        causal: whether token i sees tokens 0..i only.
        modality: ``text``, ``image`` or ``video``.
        max_tokens: longest text, ``None`` = no limit.
        sample_tokens: most tokens of a text, picture or clip, ``None`` = no limit.
        attention_heads: heads per layer.
        edge_ids: ids of the tokens that begin and end a text, where ``special_tokens`` protects them.
        config: the encoder's Hugging Face config.

    Raises:
        UserError: the model is missing, incomplete, or its attention cannot be seen.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        layers: int | list[int] = 4,
        received: bool = False,
        special_tokens: Literal["drop", "protect"] = "drop",
        dtype: str | torch.dtype | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        if special_tokens not in ("drop", "protect"):
            raise UserError(f"special_tokens={special_tokens!r}; expected 'drop' or 'protect'; change it")
        self.name_or_path = find_source(str(name_or_path))
        self.received = received
        self.special_tokens = special_tokens
        self.download = download
        self.model = load_encoder(self.name_or_path, _dtype(dtype), download)
        self.model.requires_grad_(False)
        self.config = self.model.config
        self.config.use_cache = False
        self.hidden_size = int(self.config.hidden_size)
        self.attention_heads = int(self.config.num_attention_heads)
        self.modality: Modality = find_modality(self.model)
        self.max_tokens = find_max_tokens(self.model)
        self.sample_tokens = find_sample_tokens(self.model)
        self.layers = choose_layers(layers, int(self.config.num_hidden_layers))
        self._watched = {m: i for m, i in attention_modules(self.model).items() if i in self.layers}
        self.causal = any(bool(module.is_causal) for module in self._watched)
        self._counts_positions = self.modality == "text" and counts_positions(self.model)
        self.edge_ids = self._text_edges() if special_tokens == "protect" else []
        self._fingerprint: str | None = None
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor], statistics: bool = True) -> Tokens:
        """Encode a batch.

        Args:
            inputs: ``input_ids`` [B,N] long and ``attention_mask`` [B,N] (1 = real), or ``pixel_values``
                [B,C,H,W] / [B,F,C,H,W] float.
            statistics: also take attention statistics; without them attention is plain SDPA, and costs as little.

        Returns:
            Tokens with values, mask, positions, attention, metric and, if asked for, protected.

        Raises:
            UserError: inputs of another modality or size than the model's.
        """
        wanted = "input_ids" if self.modality == "text" else "pixel_values"
        if wanted not in inputs:
            raise UserError(
                f"the batch has {', '.join(inputs)} but {self.name_or_path!r} is a backbone for "
                f"{self.modality}; expected {wanted}; choose a backbone of the data's modality"
            )
        if self.modality == "text":
            return self._encode_text(inputs, statistics=statistics)
        return self._encode_pixels(inputs[wanted], statistics)

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor], cache: Cache) -> Tokens:
        """Encode texts, or the next tokens of texts that the cache holds (``IncrementalEncoder``).

        Args:
            inputs: ``input_ids`` [B,n] long, what is new; ``attention_mask`` [B,S] over cache and new tokens;
                ``position_ids`` [B,n] long, where the cache holds tokens already.
            cache: keys and values read before; it is written to.

        Returns:
            The n new tokens.
        """
        return self._encode_text(inputs, cache)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, computed once."""
        if self._fingerprint is None:
            self._fingerprint = weights_fingerprint(self.model)
        return self._fingerprint

    def processor_config(self) -> dict[str, Any] | None:
        """How inputs were prepared in training: the model's own processor JSON, or ``None``."""
        names = ("tokenizer_config.json",) if self.modality == "text" else ("preprocessor_config.json",)
        for name in names:
            content = read_json(self.name_or_path, name, self.download)
            if content is not None:
                return content
        joint = read_json(self.name_or_path, "processor_config.json", self.download) or {}
        return joint.get("image_processor")

    def _encode_text(
        self, inputs: dict[str, Tensor], cache: Cache | None = None, statistics: bool = True
    ) -> Tokens:
        ids = inputs["input_ids"]
        new = ids.shape[1]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        self.check_text(ids)
        more: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        valid = mask.bool()[:, -new:]
        places = inputs.get("position_ids")
        if places is None:
            places = (valid.cumsum(dim=1) - 1).clamp(min=0)
        if self._counts_positions:
            more["position_ids"] = places
        values, record = self._run(statistics, input_ids=ids, attention_mask=mask, **more)
        protected = None
        if self.special_tokens == "protect":
            protected = torch.isin(ids, torch.tensor(self.edge_ids, device=ids.device)) & valid
        return Tokens(
            values=values,
            mask=valid,
            positions=places.unsqueeze(-1),
            attention=self._statistics(record, lambda x: x.masked_fill(~valid, 0.0)),
            metric=record.keys[self.layers[-1]][:, -new:],
            protected=protected,
            ids=ids,
        )

    def _encode_pixels(self, pixels: Tensor, statistics: bool) -> Tokens:
        self._check_pixels(pixels)
        grid = patch_grid(self.config, pixels)
        frames = pixels.shape[1] if pixels.dim() == 5 and self.modality == "image" else None
        images = pixels if frames is None else pixels.flatten(0, 1)
        values, record = self._run(statistics, pixel_values=images.to(self.model.dtype))
        specials = values.shape[1] - math.prod(grid)
        if specials < 0:
            raise UserError(
                f"{self.name_or_path!r} gives {values.shape[1]} tokens for {math.prod(grid)} patches; "
                "expected one token per patch, so no pyramid and no pooling; choose another backbone"
            )
        skip = specials if self.special_tokens == "drop" else 0
        positions = grid_positions(grid, specials, frames, pixels.device)
        samples = pixels.shape[0]

        def arrange(x: Tensor) -> Tensor:
            """Drop what is not wanted of [B*F,S,...] and join the frames: [B,N,...]."""
            kept = x[:, skip:]
            return kept.reshape(samples, -1, *kept.shape[2:])

        special = torch.arange(values.shape[1], device=pixels.device) < specials
        return Tokens(
            values=arrange(values),
            mask=torch.ones(arrange(values).shape[:2], dtype=torch.bool, device=pixels.device),
            positions=arrange(positions.expand(samples, -1, -1, -1).flatten(0, 1)),
            attention=self._statistics(record, lambda x: torch.stack([arrange(layer) for layer in x])),
            metric=arrange(record.keys[self.layers[-1]]),
            protected=arrange(special.expand(values.shape[0], -1))
            if self.special_tokens == "protect"
            else None,
        )

    def _run(self, statistics: bool, **inputs: Any) -> tuple[Tensor, Record]:
        device = next(iter(inputs.values())).device
        with (
            recording(self._watched, self.received, statistics) as record,
            torch.autocast(device.type, enabled=False),
        ):
            values: Tensor = self.model(**inputs).last_hidden_state
        if set(record.keys) != set(self.layers):
            raise unseen(self.config, self.name_or_path)
        return values, record

    def _statistics(self, record: Record, arrange: Callable[[Tensor], Tensor]) -> AttentionStats | None:
        """Statistics of the chosen layers, each [L,B,S] arranged as the tokens are."""
        if not record.stats:
            return None
        stats = [record.stats[layer] for layer in self.layers]
        received = [s.received for s in stats if s.received is not None]
        return AttentionStats(
            entropy=arrange(torch.cat([s.entropy for s in stats])),
            norm=arrange(torch.cat([s.norm for s in stats])),
            received=arrange(torch.cat(received)) if received else None,
        )

    def check_text(self, ids: Tensor) -> None:
        """Refuse texts that are too long, or hold ids outside the vocabulary.

        Args:
            ids: [B,N] long.

        Raises:
            UserError: they do.
        """
        if self.max_tokens is not None and ids.shape[1] > self.max_tokens:
            raise UserError(
                f"the context is {ids.shape[1]} tokens long; expected at most {self.max_tokens}, the maximum "
                f"of {self.name_or_path!r}; shorten the data's context or choose another backbone"
            )
        # On an accelerator reading the largest id would stall the device; its kernels check it themselves.
        if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= int(self.config.vocab_size):
            raise UserError(
                f"the text has token id {int(ids.max())}; expected ids under {self.config.vocab_size}, the "
                f"vocabulary of {self.name_or_path!r}; let the data use the backbone's own tokenizer"
            )

    def _check_pixels(self, pixels: Tensor) -> None:
        dims = (5,) if self.modality == "video" else (4, 5)
        if pixels.dim() not in dims or not pixels.is_floating_point():
            raise UserError(
                f"pixel_values is {pixels.dtype} of shape {list(pixels.shape)}; expected floats "
                f"{'[B,F,C,H,W]' if dims == (5,) else '[B,C,H,W] or [B,F,C,H,W]'} for {self.name_or_path!r}, "
                f"a backbone for {self.modality}; choose a backbone of the data's modality"
            )

    def _text_edges(self) -> list[int]:
        """Ids of the tokens that begin and end a text: named in the config, or BERT's in the tokenizer."""
        named: list[Any] = []
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.config, name, None)
            named += value if isinstance(value, list) else [value]
        tokenizer = read_json(self.name_or_path, "tokenizer.json", self.download) or {}
        added = tokenizer.get("added_tokens", [])
        named += [token["id"] for token in added if token["content"] in ("[CLS]", "[SEP]")]
        return sorted({int(i) for i in named if i is not None})


def _dtype(name: str | torch.dtype | None) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if dtype is None and name is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"dtype={name!r}; expected float32, bfloat16, float16 or float64; change backbone.dtype"
        )
    return dtype
