"""Merge pictures: the groups that are drawn, their colours, and figures for images, videos and text."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from qm_lightning.pictures import OVERLAY, PALETTE, Groups, merge_picture, read_groups
from qm_lightning.tokens import MergedTokens, Tokens


def grid_positions(*sizes: int) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, len(sizes))


def make(
    assignment: list[int], positions: torch.Tensor, anchors: list[int] | None = None, padding: int = 0
) -> tuple[Tokens, MergedTokens]:
    """A batch of one sample with this assignment, and padding tokens behind it."""
    count = len(assignment)
    kept = max(assignment) + 1
    mask = torch.tensor([[True] * count + [False] * padding])
    pad = torch.zeros(padding, positions.shape[1], dtype=torch.long)
    values = torch.zeros(1, count + padding, 2)
    tokens = Tokens(values=values, mask=mask, positions=torch.cat([positions, pad])[None])
    merged = MergedTokens(
        values=torch.zeros(1, kept, 2),
        mask=torch.ones(1, kept, dtype=torch.bool),
        size=torch.ones(1, kept),
        positions=torch.zeros(1, kept, positions.shape[1], dtype=torch.long),
        ready=torch.zeros(1, kept, dtype=torch.long),
        assignment=torch.tensor([assignment + [-1] * padding]),
        weights=torch.ones(1, count + padding),
        anchors=None if anchors is None else torch.tensor([anchors]),
    )
    return tokens, merged


def texts(figure: object) -> str:
    return " ".join(text.get_text() for text in figure.texts)  # type: ignore[attr-defined]


def pixels(figure: object) -> np.ndarray:
    figure.canvas.draw()  # type: ignore[attr-defined]
    return np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


def test_groups_of_a_sample_by_hand() -> None:
    tokens, merged = make([0, 0, -1, 1, 0], torch.arange(5)[:, None], anchors=[1, 3], padding=2)
    groups = read_groups(tokens, merged, 0)
    assert groups.group.tolist() == [0, 0, -1, 1, 0]
    assert groups.anchor.tolist() == [1, 1, -1, 3, 1]
    assert groups.size.tolist() == [3, 3, 0, 1, 3]
    assert groups.budget == "2 of 5 tokens"


def test_padding_in_front_of_an_anchor_does_not_shift_it() -> None:
    """Masks need not be contiguous: anchors count input tokens, the picture valid ones."""
    tokens, merged = make([0, 0, 0], torch.arange(3)[:, None], anchors=[3])
    mask = torch.tensor([[True, False, True, True]])
    tokens = Tokens(values=torch.zeros(1, 4, 2), mask=mask, positions=torch.arange(4)[None, :, None])
    merged = MergedTokens(**{**vars(merged), "assignment": torch.tensor([[0, -1, 0, 0]])})
    assert read_groups(tokens, merged, 0).anchor.tolist() == [2, 2, 2]


def test_select_renumbers_anchors_and_forgets_those_outside() -> None:
    tokens, merged = make([0, 0, 1, 1], torch.arange(4)[:, None], anchors=[0, 3])
    chosen = read_groups(tokens, merged, 0).select(np.array([False, True, True, True]))
    assert chosen.anchor.tolist() == [-1, 2, 2]


def test_only_groups_of_two_or_more_have_a_colour() -> None:
    tokens, merged = make([0, 0, 1, -1], torch.arange(4)[:, None])
    coloured = ~np.isnan(read_groups(tokens, merged, 0).colours()[:, 0])
    assert coloured.tolist() == [True, True, False, False]


def test_touching_groups_never_share_a_colour() -> None:
    """Forty bands of two columns: more groups than colours, so colours must repeat, but not side by side."""
    positions = grid_positions(2, 40)
    assignment = (positions[:, 1] // 2).tolist()
    tokens, merged = make(assignment, positions)
    groups = read_groups(tokens, merged, 0)
    by_group = {
        g: tuple(rgb) for g, rgb in zip(groups.group.tolist(), groups.colours().tolist(), strict=True)
    }
    assert len(set(by_group.values())) == len(PALETTE)
    assert all(by_group[g] != by_group[g + 1] for g in range(19))


def test_few_groups_all_have_their_own_colour() -> None:
    positions = grid_positions(4, 4)
    assignment = (positions[:, 0] // 2 * 2 + positions[:, 1] // 2).tolist()
    groups = read_groups(*make(assignment, positions), 0)
    assert len({tuple(rgb) for rgb in groups.colours().tolist()}) == 4


@pytest.mark.parametrize("channels", [None, 3])
def test_image_picture_paints_groups_where_they_are(channels: int | None) -> None:
    """Upper half one group, lower half single tokens: on a white picture only the upper half has colour."""
    positions = grid_positions(4, 4)
    assignment = [0] * 8 + list(range(1, 9))
    tokens, merged = make(assignment, positions, anchors=[0, *range(8, 16)])
    image = np.ones((16, 16) if channels is None else (16, 16, channels))
    figure = merge_picture(image, merged, 0, tokens=tokens)
    assert "9 of 16 tokens" in figure.get_suptitle()
    axes = figure.axes[0]
    overlay = axes.images[1].get_array()
    assert np.allclose(overlay[:2, :, 3], OVERLAY)
    assert np.allclose(overlay[2:, :, 3], 0.0)
    drawn = pixels(figure)
    assert len(np.unique(drawn.reshape(-1, 4), axis=0)) > 10


def test_dropped_patches_are_darkened() -> None:
    tokens, merged = make([0, -1, -1, 1], grid_positions(2, 2), anchors=[0, 3])
    axes = merge_picture(np.ones((4, 4)), merged, 0, tokens=tokens).axes[0]
    alpha = axes.images[1].get_array()[..., 3]
    assert (alpha[0, 1], alpha[1, 0]) == (alpha.max(), alpha.max())
    assert alpha[0, 0] == alpha[1, 1] == 0.0
    assert alpha.max() > OVERLAY


def test_nothing_merged_draws_anchors_and_no_colour() -> None:
    tokens, merged = make(list(range(9)), grid_positions(3, 3), anchors=list(range(9)))
    figure = merge_picture(np.zeros((6, 6)), merged, 0, tokens=tokens, title="NoMerge")
    assert figure.get_suptitle() == "NoMerge   9 of 9 tokens"
    assert not figure.axes[0].images[1].get_array()[..., 3].any()
    assert len(figure.axes[0].collections[-1].get_offsets()) == 9


def test_class_tokens_count_but_are_not_painted() -> None:
    positions = torch.cat([torch.zeros(1, 2, dtype=torch.long), grid_positions(2, 2)])
    tokens, merged = make([0, 1, 1, 2, 2], positions, anchors=[0, 1, 3])
    protected = torch.tensor([[True, False, False, False, False]])
    tokens = Tokens(values=tokens.values, mask=tokens.mask, positions=tokens.positions, protected=protected)
    figure = merge_picture(np.zeros((4, 4)), merged, 0, tokens=tokens)
    assert figure.get_suptitle() == "3 of 5 tokens"
    assert np.allclose(figure.axes[0].images[1].get_array()[..., 3], OVERLAY)


@pytest.mark.parametrize(("steps", "frames", "panels"), [(4, 8, 4), (16, 16, 8), (1, 3, 1)])
def test_video_is_a_strip_of_frames(steps: int, frames: int, panels: int) -> None:
    positions = grid_positions(steps, 2, 2)
    tokens, merged = make((positions[:, 0]).tolist(), positions, anchors=[4 * t for t in range(steps)])
    video = np.linspace(0, 1, frames)[:, None, None] * np.ones((frames, 8, 8))
    figure = merge_picture(video, merged, 0, tokens=tokens)
    assert len(figure.axes) == panels
    shown = [float(axes.images[0].get_array().max()) for axes in figure.axes]
    assert shown == sorted(shown)
    assert shown[0] == 0.0
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "frame 0: 1 kept"
    assert titles[-1] == f"frame {(steps - 1) * frames // steps}: 1 kept"


def test_a_frame_without_anchors_says_so() -> None:
    tokens, merged = make([0] * 8, grid_positions(2, 2, 2), anchors=[0])
    figure = merge_picture(np.ones((4, 8, 8)), merged, 0, tokens=tokens)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["frame 0: 1 kept", "frame 2: 0 kept"]


def test_colour_video_and_still_picture_for_a_video() -> None:
    positions = grid_positions(2, 2, 2)
    tokens, merged = make([0] * 8, positions, anchors=[0])
    assert len(merge_picture(np.ones((4, 8, 8, 3)), merged, 0, tokens=tokens).axes) == 2
    assert len(merge_picture(np.ones((8, 8, 3)), merged, 0, tokens=tokens).axes) == 2


def test_no_pyplot_state_is_touched() -> None:
    import subprocess

    code = (
        "import numpy, torch, sys; from qm_lightning.pictures import merge_picture;"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_string_per_valid_or_per_padded_token() -> None:
    tokens, merged = make([0, 0, 1], torch.arange(3)[:, None], anchors=[0, 2], padding=2)
    for strings in (["a", "b", "c"], ["a", "b", "c", "", ""]):
        drawn = [text.get_text() for text in merge_picture(strings, merged, 0, tokens=tokens).axes[0].texts]
        assert drawn == ["a", "b", "c"]
    with pytest.raises(ValueError, match="4 strings for 3 tokens"):
        merge_picture(["a", "b", "c", "d"], merged, 0, tokens=tokens)


def test_groups_are_read_per_sample() -> None:
    one = make([0, 0, 1, 1], torch.arange(4)[:, None], anchors=[0, 2])
    two = make([0, 1, 1, 1], torch.arange(4)[:, None], anchors=[0, 1])
    tokens = Tokens(
        values=torch.cat([one[0].values, two[0].values]),
        mask=torch.cat([one[0].mask, two[0].mask]),
        positions=torch.cat([one[0].positions, two[0].positions]),
    )
    merged = MergedTokens(
        **{
            name: torch.cat([getattr(one[1], name), getattr(two[1], name)])
            for name in ("values", "mask", "size", "positions", "ready", "assignment", "weights", "anchors")
        }
    )
    second = read_groups(tokens, merged, 1)
    assert isinstance(second, Groups)
    assert second.group.tolist() == [0, 1, 1, 1]
    assert second.anchor.tolist() == [0, 1, 1, 1]
