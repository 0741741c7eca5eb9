"""Tasks on real source code: each cuts a context out of a document and says what its target is."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from datamodules.sources.documents import Document

_SHORTEST_FUNCTION = 120  # bytes; shorter ones say nothing of their name
_MASK = b"_" * 3
_SYMBOLS = frozenset((string.digits + string.punctuation).encode())


@dataclass(frozen=True)
class Lengths:
    """How long a context and a target are, in bytes."""

    context: int
    target: int


Pair = tuple[bytes, bytes | None]
"""Context and target; no target where the text itself is to be predicted."""

Task = Callable[[Document, np.random.RandomState, Lengths], Pair | None]
"""(document, random, lengths) -> pair, or `None` if this draw gives no sample."""


def passage(document: Document, random: np.random.RandomState, length: int) -> bytes | None:
    """A run of bytes at a random place; `None` if the document is shorter."""
    text = document.read()
    if len(text) < length:
        return None
    start = int(random.randint(len(text) - length + 1))
    return text[start : start + length]


def text_alone(document: Document, random: np.random.RandomState, lengths: Lengths) -> Pair | None:
    """A passage and nothing else, for models that predict every token of it (`TextDataModule(targets="text")`)."""
    text = passage(document, random, lengths.context)
    return None if text is None else (text, None)


def origin(document: Document, random: np.random.RandomState, lengths: Lengths) -> Pair | None:
    """A passage -> the package or module that it is from."""
    text = passage(document, random, lengths.context)
    return None if text is None else (text, document.package.encode()[: lengths.target])


def continuation(document: Document, random: np.random.RandomState, lengths: Lengths) -> Pair | None:
    """A passage -> the bytes that follow it."""
    text = passage(document, random, lengths.context + lengths.target)
    return None if text is None else (text[: lengths.context], text[lengths.context :])


def function(document: Document, random: np.random.RandomState, lengths: Lengths) -> Pair | None:
    """A function with its own name masked -> its name. Of longer functions the beginning is the context."""
    found = functions(document)
    if not found:
        return None
    source, name = found[int(random.randint(len(found)))]
    return source[: lengths.context], name[: lengths.target]


@lru_cache(maxsize=1024)
def functions(document: Document) -> tuple[tuple[bytes, bytes], ...]:
    """Functions of a document as (source without its name, name), without special and very short ones."""
    text = document.read()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ()
    lines = text.splitlines(keepends=True)
    found: list[tuple[bytes, bytes]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
            source = b"".join(lines[node.lineno - 1 : node.end_lineno])
            name = node.name.encode()
            if len(source) >= _SHORTEST_FUNCTION:
                found.append((re.sub(rb"\b" + name + rb"\b", _MASK, source), name))
    return tuple(found)


def symbols(
    document: Document, random: np.random.RandomState, lengths: Lengths
) -> tuple[bytes, bytes] | None:
    """A passage -> the digits and punctuation marks in it, each once, in the order of their codes.

    A mark that stands in one place only is seen by a reader of the whole passage alone.
    """
    text = passage(document, random, lengths.context)
    if text is None:
        return None
    return text, bytes(sorted(set(text) & _SYMBOLS))[: lengths.target]


TASKS: dict[str, Task] = {
    "origin": origin,
    "function": function,
    "continuation": continuation,
    "symbols": symbols,
    "passage": text_alone,
}
