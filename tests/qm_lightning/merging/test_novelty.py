"""Clips: what stands still costs fewer tokens than what moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.sources.digits import load_scans
from datamodules.sources.moving import draw_clip
from qm_lightning.attention import attention_with_stats
from qm_lightning.errors import UserError
from qm_lightning.merging import EntropyBudget, QuickMerge
from qm_lightning.merging.novelty import repetition
from qm_lightning.tokens import Tokens

STEPS, SIDE = 8, 8


def grid(samples: int) -> torch.Tensor:
    axes = [torch.arange(n) for n in (STEPS, SIDE, SIDE)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).expand(samples, -1, -1)


def clip_tokens(frames: np.ndarray) -> Tokens:
    """Patches of clips [B,F,64,64] as tokens; their attention is that of the patches on each other."""
    B = len(frames)
    patches = torch.from_numpy(frames.astype(np.float32) / 255).view(B, STEPS, SIDE, 8, SIDE, 8)
    values = patches.permute(0, 1, 2, 4, 3, 5).reshape(B, STEPS * SIDE * SIDE, 64)
    values = torch.cat(
        [values, torch.full_like(values[..., :1], 0.1)], -1
    )  # empty patches have a direction, too
    _, stats = attention_with_stats(*(values[:, None],) * 3)
    return Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool), grid(B), stats)


@pytest.fixture(scope="module")
def clips() -> tuple[Tokens, Tokens]:
    """The same 24 real clips busy, and frozen in their middle frame."""
    random = np.random.RandomState(0)
    busy = np.stack([draw_clip(load_scans("test"), random, STEPS, fastest=6.0).frames for _ in range(24)])
    return clip_tokens(busy), clip_tokens(np.repeat(busy[:, STEPS // 2, None], STEPS, axis=1))


def kept(tokens: Tokens, novelty: float) -> torch.Tensor:
    merger = QuickMerge(EntropyBudget(2.37, floor=0.05, ceiling=2.37), novelty=novelty).eval()
    return merger(tokens).mask.sum(1).float()


def test_a_frozen_clip_keeps_fewer_tokens_than_a_busy_one(clips: tuple[Tokens, Tokens]) -> None:
    busy, frozen = (kept(tokens, 1.0) for tokens in clips)
    assert (frozen <= busy).float().mean() > 0.9
    assert frozen.mean() < 0.7 * busy.mean()
    blind = [kept(tokens, 0.0).mean() for tokens in clips]
    assert frozen.mean() / busy.mean() < 0.8 * blind[1] / blind[0]  # it is novelty that sees the standstill


def test_repetition_by_hand() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    values = torch.stack([east, north, east, east, -north, north])[None]
    positions = torch.tensor([[[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [2, 0, 1], [3, 0, 1]]])
    tokens = Tokens(values, torch.ones(1, 6, dtype=torch.bool), positions)
    # first step; first step; the same; a quarter turn; another one; the opposite
    assert repetition(tokens).tolist() == [[0, 0, 1, 0, 0, 0]]
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    shuffled = Tokens(values[:, order], tokens.mask, positions[:, order])
    assert torch.equal(repetition(shuffled), repetition(tokens)[:, order])
    gone = replace(tokens, mask=torch.tensor([[False, True, True, True, True, True]]))
    assert repetition(gone).tolist() == [[0, 0, 0, 0, 0, 0]]  # what is compared with must be there
    protected = replace(tokens, protected=torch.tensor([[True, False, False, False, False, False]]))
    assert repetition(protected).tolist() == [[0, 0, 0, 0, 0, 0]]


def test_pictures_and_texts_are_not_touched(clips: tuple[Tokens, Tokens]) -> None:
    picture = replace(clips[0], positions=clips[0].positions[..., 1:])
    assert not repetition(picture).any()
    with pytest.raises(UserError, match="novelty"):
        QuickMerge(novelty=1.5)
