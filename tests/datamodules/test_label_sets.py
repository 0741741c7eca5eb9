from __future__ import annotations

import pytest
import torch

from datamodules.errors import DataError
from datamodules.processing.label_sets import DigitLabels, TextLabels, drawn_order
from datamodules.processing.labels import LabelReader


def test_digits_become_a_set_in_a_drawn_order() -> None:
    labels = DigitLabels()
    rows = [labels.encode([3, 1, 3, 7], 64, seed).tolist() for seed in range(20)]
    assert all(sorted(row[::2]) == [1, 3, 7] and row[1::2] == [10] * 3 for row in rows)
    assert len({tuple(row) for row in rows}) > 1
    assert rows[4] == labels.encode([1, 3, 7], 64, 4).tolist()
    assert labels.decode(torch.tensor([7, 10, 3, 10, -100])) == "7, 3"


def test_texts_become_lower_case_labels() -> None:
    ids = TextLabels().encode("Red Fox, owl,, red fox ", 64, 0)
    assert sorted(TextLabels().decode(ids).split(", ")) == ["owl", "red fox"]


def test_labels_that_do_not_fit_are_left_out_whole() -> None:
    assert drawn_order([[1, 2, 3], [4]], 9, 2, 0).tolist() == [4, 9]
    with pytest.raises(DataError, match="1 labels and none fits into 2"):
        drawn_order([[1, 2, 3]], 9, 2, 0)


def test_reader() -> None:
    words = LabelReader("word_labels").read({"digits.json": b"[3,3]"})
    assert TextLabels().decode(words) == "three"
    assert LabelReader("word_labels").is_set
    assert not LabelReader("digits").is_set
    with pytest.raises(DataError, match="expected a list of digits"):
        LabelReader("digit_labels").read({"digits.json": b'["x"]'})
    with pytest.raises(DataError, match="0 labels"):
        LabelReader("text_labels").read({"txt": b" , "})
    with pytest.raises(DataError, match="targets is 'words'"):
        LabelReader("words")  # type: ignore[arg-type]
