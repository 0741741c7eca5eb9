import argparse
import ast
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.sources.documents import Document, split_of, stdlib_documents
from datamodules.sources.drawn import DrawOptions
from datamodules.sources.splits import SPLITS
from datamodules.sources.text import StdlibSamples, add_arguments, prepare
from datamodules.sources.text_tasks import (
    TASKS,
    Lengths,
    continuation,
    function,
    functions,
    origin,
    passage,
    symbols,
)

LENGTHS = Lengths(64, 16)


def document(tmp_path: Path, text: str, name: str = "pack/mod.py") -> Document:
    path = tmp_path / "file.py"
    path.write_text(text)
    return Document(name, path, len(text))


def test_no_file_is_in_two_splits_and_packages_are_in_both() -> None:
    names = {s: {d.name for d in stdlib_documents(s)} for s in SPLITS}
    assert sum(map(len, names.values())) == len(set.union(*names.values()))
    packages = {s: {d.package for d in stdlib_documents(s)} for s in SPLITS}
    assert {"asyncio", "email"} <= packages["train"] & packages["test"]
    assert len(packages["train"] & packages["test"]) >= 10


def test_the_corpus_is_the_plain_library() -> None:
    for split in SPLITS:
        documents = stdlib_documents(split)
        assert documents == tuple(sorted(documents, key=lambda d: d.path))
        for d in documents:
            assert not {"site-packages", "test", "encodings"} & set(d.name.split("/"))
            assert d.size == len(d.read()) >= 512
            assert d.read().isascii()


def test_splits_have_their_shares_and_never_change() -> None:
    shares = [np.mean([split_of(f"file{i}.py") == s for i in range(4000)]) for s in SPLITS]
    np.testing.assert_allclose(shares, [0.80, 0.05, 0.15], atol=0.02)
    assert [split_of(n) for n in ("asyncio/events.py", "email/message.py", "ast.py")] == [
        split_of(n) for n in ("asyncio/events.py", "email/message.py", "ast.py")
    ]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_samples_are_a_pure_function_of_their_number(task: str) -> None:
    samples = StdlibSamples("val", 5, 3, task, LENGTHS)
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301 our own bytes
    assert [samples[i] for i in range(5)] == [copy[i] for i in range(5)]
    assert len({samples[i]["txt"] for i in range(5)}) > 1
    assert samples[0] != StdlibSamples("val", 5, 4, task, LENGTHS)[0]
    for i in range(5):
        assert 0 < len(samples[i]["txt"]) <= LENGTHS.context
        if task == "passage":
            assert "target.txt" not in samples[i]
        else:
            assert 0 < len(samples[i]["target.txt"]) <= LENGTHS.target


def test_long_files_are_drawn_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(stdlib_documents("val"), key=lambda d: d.size)
    samples = StdlibSamples("val", 300, 0, "origin", LENGTHS)
    drawn = np.mean([samples[i]["target.txt"] == longest.package.encode() for i in range(300)])
    same = [d for d in stdlib_documents("val") if d.package == longest.package]
    expected = sum(d.size for d in same) / sum(d.size for d in stdlib_documents("val"))
    assert drawn == pytest.approx(expected, abs=0.1)


def test_a_passage_is_a_run_of_the_document(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))
    d = document(tmp_path, text)
    got = {passage(d, np.random.RandomState(i), 98) for i in range(40)}
    assert got == {text[i : i + 98].encode() for i in range(3)}
    assert passage(d, np.random.RandomState(0), 101) is None


def test_symbols_by_hand(tmp_path: Path) -> None:
    text = b"if a[1] == {0: 'b1'}:\n"
    (tmp_path / "m.py").write_bytes(text)
    d = Document("m.py", tmp_path / "m.py", len(text))
    random = np.random.RandomState(0)
    assert symbols(d, random, Lengths(len(text), 32)) == (text, b"'01:=[]{}")
    assert symbols(d, random, Lengths(len(text), 3)) == (text, b"'01")
    assert symbols(d, random, Lengths(len(text) + 1, 3)) is None


def test_origin_and_continuation_by_hand(tmp_path: Path) -> None:
    d = document(tmp_path, "0123456789")
    assert origin(d, np.random.RandomState(0), Lengths(10, 3)) == (b"0123456789", b"pac")
    assert continuation(d, np.random.RandomState(0), Lengths(7, 3)) == (b"0123456", b"789")
    assert continuation(d, np.random.RandomState(0), Lengths(8, 3)) is None


def test_function_hides_its_name(tmp_path: Path) -> None:
    body = "\n".join(f"    x{i} = walk(x{i}, walker)" for i in range(8))
    d = document(tmp_path, f"import os\n\ndef walk(x0):\n{body}\n\ndef tiny():\n    pass\n")
    ((source, name),) = functions(d)
    assert name == b"walk"
    assert source.startswith(b"def ___(x0):\n    x0 = ___(x0, walker)")
    assert function(d, np.random.RandomState(0), Lengths(12, 2)) == (b"def ___(x0):", b"wa")


def test_a_file_that_does_not_parse_has_no_functions(tmp_path: Path) -> None:
    assert functions(document(tmp_path, "def (:")) == ()


def test_real_functions_are_named_in_their_files() -> None:
    d = next(d for d in stdlib_documents("train") if functions(d))
    names = {
        n.name for n in ast.walk(ast.parse(d.read())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for source, name in functions(d):
        assert name.decode() in names
        assert b"def " in source


def test_prepare_checks_its_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text source 'web', expected stdlib"):
        prepare("web", tmp_path)
    with pytest.raises(DataError, match="expected 1 or more"):
        prepare("stdlib", tmp_path, context_bytes=0)
    with pytest.raises(DataError, match="expected shorter contexts"):
        prepare("stdlib", tmp_path, context_bytes=10**8, train=1, val=0, test=0)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    options = {"train": 3, "val": 2, "test": 0, "context_bytes": 32}
    prepare("stdlib", tmp_path, task="origin", **options)
    before = (tmp_path / "train" / "index.json").read_bytes()
    prepare("stdlib", tmp_path, task="origin", **options)
    with pytest.raises(DataError, match="prepared with another task"):
        prepare("stdlib", tmp_path, task="continuation", **options)
    assert (tmp_path / "train" / "index.json").read_bytes() == before
    assert not (tmp_path / "test").exists()


def test_options_are_those_of_prepare() -> None:
    import inspect

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = vars(parser.parse_args([]))
    own = set(inspect.signature(prepare).parameters) - {"source", "out", "options"}
    assert set(options) == own | DrawOptions.__optional_keys__
