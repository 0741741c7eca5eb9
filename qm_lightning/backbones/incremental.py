"""Encodes texts that grow by one token at a time without reading them again: the backbone's own key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from qm_lightning.backbones.hf import HFBackbone
from qm_lightning.merging import Merger
from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens


@dataclass
class _Read:
    """What was read so far.

    Attributes:
        cache: keys and values of the backbone; slots of padding stay in it, masked.
        seen: [B,S] long, 1 = the cache's slot holds a real token.
        tokens: the texts' tokens, without gaps.
    """

    cache: DynamicCache
    seen: Tensor
    tokens: Tokens


class IncrementalEncoder:
    """A causal text backbone that remembers what it has read.

    The first call reads the texts whole; a later one that has one token more in each text reads that token only.
    Any other call starts anew, as does every call if the backbone keeps no cache.

    Args:
        backbone: a text backbone.
    """

    def __init__(self, backbone: HFBackbone) -> None:
        self.backbone = backbone
        accepted = inspect.signature(backbone.model.forward).parameters
        wanted = {"past_key_values", "position_ids", "use_cache"}
        # A sliding window would count the cache's slots of padding as tokens.
        plain = backbone.causal and getattr(backbone.config, "sliding_window", None) is None
        self._can_cache = plain and not backbone.received and wanted <= accepted.keys()
        self._read: _Read | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tokens:
        """Encode.

        Args:
            ids: [B,N] long, padded at the end.
            mask: [B,N] bool, True = real token.

        Returns:
            The same tokens that ``backbone`` gives for the whole texts, but for rounding.
        """
        self.backbone.check_text(ids)
        whole = {"input_ids": ids, "attention_mask": mask.long()}
        if not self._can_cache:
            tokens: Tokens = self.backbone(whole)
            return tokens
        read = self._read
        if read is None or not _one_more(read.tokens, ids, mask):
            cache = DynamicCache(config=self.backbone.config)
            self._read = _Read(cache, mask.long(), self.backbone.read(whole, cache))
            return self._read.tokens
        place = mask.sum(dim=1, keepdim=True) - 1
        seen = F.pad(read.seen, (0, 1), value=1)
        newest = self.backbone.read(
            {"input_ids": ids.gather(1, place), "attention_mask": seen, "position_ids": place}, read.cache
        )
        tokens = _appended(read.tokens, newest, place.squeeze(1))
        self._read = _Read(read.cache, seen, tokens)
        return tokens


def growing_encoder(backbone: HFBackbone, merger: Merger) -> Callable[[Tensor, Tensor], MergedTokens]:
    """Backbone and merger for one batch of texts that grow; the backbone reads each token once.

    Args:
        backbone: a text backbone.
        merger: of class "streaming".

    Returns:
        Ids [B,N] long and mask [B,N] bool -> the merged tokens: what ``StreamingPrior.generate`` asks for.
    """
    encode = IncrementalEncoder(backbone)
    return lambda ids, mask: merger(encode(ids, mask))


def _one_more(tokens: Tokens, ids: Tensor, mask: Tensor) -> bool:
    """Whether the texts are those of ``tokens`` with one more token each."""
    old = tokens.mask
    assert tokens.ids is not None  # noqa: S101  # HFBackbone's
    if old.shape[0] != mask.shape[0] or old.shape[1] > mask.shape[1]:
        return False
    same_length = torch.equal(tokens.counts + 1, mask.sum(dim=1))
    return same_length and torch.equal(tokens.ids[old], ids[:, : old.shape[1]][old])


def _appended(tokens: Tokens, newest: Tokens, place: Tensor) -> Tokens:
    """``tokens`` with one more in each text: that of ``newest`` [B,1,...] at index ``place`` [B]."""
    rows = torch.arange(len(place), device=place.device)
    room = max(0, int(place.max()) + 1 - tokens.mask.shape[1])

    def put(old: Tensor, new: Tensor) -> Tensor:
        wide = torch.cat([old, old.new_zeros(old.shape[0], room, *old.shape[2:])], dim=1)
        wide[rows, place] = new[:, 0]
        return wide

    def put_layers(old: Tensor, new: Tensor) -> Tensor:
        return torch.stack([put(o, n) for o, n in zip(old, new, strict=True)])

    assert tokens.attention is not None and newest.attention is not None  # noqa: S101, PT018  # HFBackbone's
    assert tokens.metric is not None and newest.metric is not None  # noqa: S101, PT018
    assert tokens.ids is not None and newest.ids is not None  # noqa: S101, PT018
    protected = None
    if tokens.protected is not None and newest.protected is not None:
        protected = put(tokens.protected, newest.protected)
    return Tokens(
        values=put(tokens.values, newest.values),
        mask=put(tokens.mask, torch.ones_like(newest.mask[:, :1])),
        positions=put(tokens.positions, place.reshape(-1, 1, 1)),
        attention=AttentionStats(
            put_layers(tokens.attention.entropy, newest.attention.entropy),
            put_layers(tokens.attention.norm, newest.attention.norm),
        ),
        metric=put(tokens.metric, newest.metric),
        protected=protected,
        ids=put(tokens.ids, newest.ids),
    )
