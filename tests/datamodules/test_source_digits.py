import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.sources.digits import SCANS_PER_SPLIT, enlarge, load_scans
from datamodules.sources.image import DigitScenes
from datamodules.sources.scenes import BACKGROUND, CANVAS, MAX_DIGITS, MAX_SHARED, PATCH, Box, draw_scene
from datamodules.sources.splits import SPLITS


def test_no_scan_is_in_two_splits() -> None:
    rows = [load_scans(split).rows for split in SPLITS]
    assert [len(r) for r in rows] == [SCANS_PER_SPLIT[s] for s in SPLITS]
    together = np.concatenate(rows)
    assert len(np.unique(together)) == len(together) == 1797


def test_scans_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = load_scans("val")
    np.testing.assert_allclose(scans.ink * 16, data.images[scans.rows])
    np.testing.assert_array_equal(scans.digits, data.target[scans.rows])


def test_every_split_has_every_digit() -> None:
    for split in SPLITS:
        assert set(load_scans(split).digits.tolist()) == set(range(10))


def test_enlarged_ink_stays_in_range_and_keeps_its_amount() -> None:
    ink = load_scans("train").ink[0]
    large = enlarge(ink, 24)
    assert large.shape == (24, 24)
    assert large.min() >= 0
    assert large.max() <= 1
    assert large.mean() == pytest.approx(ink.mean(), rel=0.05)


def test_shared_area_by_hand() -> None:
    assert Box(0, 0, 10).shared(Box(5, 5, 10)) == pytest.approx(0.25)
    assert Box(0, 0, 10).shared(Box(0, 0, 20)) == 1.0
    assert Box(0, 0, 10).shared(Box(10, 0, 10)) == 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1))
def test_scene_properties(seed: int) -> None:
    scene = draw_scene(load_scans("test"), np.random.RandomState(seed))
    assert scene.canvas.shape == (CANVAS, CANVAS)
    assert 1 <= len(scene.digits) == len(scene.boxes) <= MAX_DIGITS
    assert all(0 <= b.row <= CANVAS - b.size and 0 <= b.column <= CANVAS - b.size for b in scene.boxes)
    assert set(scene.patch_labels.tolist()) <= {*scene.digits, BACKGROUND}
    for i, box in enumerate(scene.boxes):
        assert all(box.shared(other) <= MAX_SHARED for other in scene.boxes[:i])


def test_patch_labels_follow_the_ink() -> None:
    scene = draw_scene(load_scans("train"), np.random.RandomState(1), count=1)
    labels = scene.patch_labels.reshape(CANVAS // PATCH, CANVAS // PATCH)
    patches = scene.canvas.reshape(8, PATCH, 8, PATCH).mean(axis=(1, 3))
    inked = labels == scene.digits[0]
    assert inked.any()
    assert patches[inked].min() > np.median(patches[~inked])
    box = scene.boxes[0]
    for row, column in np.argwhere(inked) * PATCH:
        assert box.row - PATCH < row < box.row + box.size
        assert box.column - PATCH < column < box.column + box.size


def test_samples_are_a_pure_function_of_seed_split_and_index() -> None:
    scenes = DigitScenes("train", 3, seed=7)
    copy = pickle.loads(pickle.dumps(scenes))  # noqa: S301 our own bytes
    assert [scenes[i] for i in range(3)] == [copy[i] for i in range(3)]
    assert scenes[0] != scenes[1]
    assert scenes[0]["png"] != DigitScenes("train", 3, seed=8)[0]["png"]
    assert scenes[0]["png"] != DigitScenes("val", 3, seed=7)[0]["png"]


def test_digits_of_a_sample_are_sorted() -> None:
    import json

    for i in range(20):
        digits = json.loads(DigitScenes("test", 20, seed=0)[i]["digits.json"])
        assert digits == sorted(digits)
