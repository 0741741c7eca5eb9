"""`python -m datamodules prepare text --source FOLDER|FILE.jsonl`: anyone's texts."""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.sources.own.checking import BadFileError, Found
from datamodules.sources.own.files import files_below, named_split, say_left_aside, split_folders, stamp
from datamodules.sources.own.preparing import Options, add_own_arguments, prepare_own

SUFFIXES = (".txt", ".text", ".md", ".rst")
RECORDS = (".jsonl", ".ndjson")
CHUNK = 4 << 20  # bytes of a JSONL file that are checked in one go


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare text` for a folder or a JSONL file."""
    parser.add_argument("--context_bytes", type=int, default=256, help="of a passage")
    parser.add_argument("--target_bytes", type=int, default=64, help="that follow it and are its target")
    parser.add_argument("--suffixes", default=",".join(SUFFIXES), help="of text files, with commas")
    parser.add_argument("--text_field", default="text", help="of JSONL records")
    parser.add_argument("--target_field", default="target", help="of JSONL records; without: passages")
    add_own_arguments(parser)


def prepare(
    source: str,
    out: Path,
    *,
    context_bytes: int = 256,
    target_bytes: int = 64,
    suffixes: str = ",".join(SUFFIXES),
    text_field: str = "text",
    target_field: str = "target",
    **options: Any,
) -> None:
    """Write shards of contexts (`txt`) and targets (`target.txt`).

    A JSONL record with a target is one sample. Everything else is cut into passages that follow each other: a
    context and, as its target, what comes after it. A file or record lies in one split as a whole.

    Args:
        source: a folder of text files or JSONL files, also as `train/`, `val/`, `test/`; or one JSONL file.
        out: the data set's folder.
        context_bytes: longest context of a passage, cut between characters.
        target_bytes: longest target of a passage.
        suffixes: of text files.
        text_field: of JSONL records.
        target_field: of JSONL records.
        **options: see `Options`.

    Raises:
        DataError: nothing that can be used.
    """
    if min(context_bytes, target_bytes) < 8:
        raise DataError(
            f"context_bytes is {context_bytes} and target_bytes {target_bytes}, expected 8 or more each"
        )
    root = Path(source)
    cut = {"context": context_bytes, "target": target_bytes, "fields": [text_field, target_field]}
    endings = tuple(s.strip().lower() for s in suffixes.split(",") if s.strip())
    items = text_items(root, endings)
    say_left_aside(root, (*endings, *RECORDS))
    items = [{**item, **cut} for item in items]
    recipe = {"modality": "text", "source": str(root.resolve()), **cut}
    prepare_own(out, items, check_text, load_text, recipe, Options(**options))


def text_items(root: Path, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Files to check, JSONL files in pieces: name, path, stamp, split, and the bytes where a piece begins and ends.

    Raises:
        DataError: there is none.
    """
    if root.is_file():
        paths: list[tuple[str | None, Path]] = [(None, root)]
        root = root.parent
    else:
        folders: list[tuple[str | None, Path]] = [*split_folders(root).items()] or [(None, root)]
        paths = [
            (split, path) for split, folder in folders for path in files_below(folder, (*suffixes, *RECORDS))
        ]
    if not paths:
        raise DataError(
            f"found no texts below {root}, expected {', '.join(suffixes)} or {', '.join(RECORDS)}; check --source, "
            "or name your files' endings with --suffixes"
        )
    items: list[dict[str, Any]] = []
    for split, path in paths:
        item: dict[str, Any] = {"name": path.relative_to(root).as_posix(), "path": str(path), "split": split}
        size, _ = item["stamp"] = stamp(path)
        if path.suffix.lower() in RECORDS:
            items += [{**item, "piece": [a, min(a + CHUNK, size)]} for a in range(0, max(size, 1), CHUNK)]
        else:
            items.append(item)
    return items


def check_text(item: dict[str, Any]) -> list[Found]:
    """Read one file, or the records that begin in one piece of a JSONL file.

    Raises:
        BadFileError: the file cannot be used; a record that cannot be used is among what is returned.
    """
    if "piece" not in item:
        text = Path(item["path"]).read_bytes()
        return _passages(item, text, {"group": item["name"]})
    found: list[Found] = []
    begin, end = item["piece"]
    with Path(item["path"]).open("rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()  # the rest of a record that began before
        while (offset := file.tell()) < end:
            line = file.readline()
            if not line:
                break
            place = {**item, "name": f"{item['name']}@{offset}"}
            if line.strip():
                found += _record(place, line, {"at": [offset, len(line)], "group": place["name"]})
    if not found and not begin:
        raise BadFileError("file is empty")
    return found


def _record(item: dict[str, Any], line: bytes, place: dict[str, Any]) -> list[Found]:
    try:
        text, target, split = read_record(line, item["fields"])
        item = {**item, "split": item["split"] or split}
        if target is None:
            return _passages(item, text.encode(), place)
        if not target:
            raise BadFileError("target is empty")
        if not text.strip():
            raise BadFileError("text is empty")
        return [_found(item, place)]
    except BadFileError as error:
        return [Found(item["name"], None, error.kind, error.detail)]


def read_record(line: bytes, fields: list[str]) -> tuple[str, str | None, str | None]:
    """Text, target (None: none) and split (None: none) of a JSONL record.

    Raises:
        BadFileError: it is no JSON object with a text.
    """
    text_field, target_field = fields
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadFileError("text is not UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadFileError("not JSON", str(error)) from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadFileError(f"no field {text_field!r}", "expected a string")
    target = record.get(target_field)
    if target is not None and not isinstance(target, str):
        raise BadFileError(f"{target_field!r} is no string")
    try:
        (text + (target or "")).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise BadFileError("text is not Unicode", str(error)) from None
    return text, target, named_split(str(record.get("split", "")))


def _passages(item: dict[str, Any], text: bytes, place: dict[str, Any]) -> list[Found]:
    if not text.strip():
        raise BadFileError("text is empty")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFileError("text is not UTF-8", str(error)) from None
    length = item["context"] + item["target"]
    count = len(text) // length
    if not count:
        raise BadFileError("text is too short", f"{len(text)} bytes, a passage takes {length}")
    return [_found(item, {**place, "passage": i}, f"-{i:06d}") for i in range(count)]


def _found(item: dict[str, Any], place: dict[str, Any], suffix: str = "") -> Found:
    kept = {k: item[k] for k in ("path", "split", "context", "target", "fields")}
    name = item["name"] + suffix
    return Found(name, {**kept, **place, "name": name})


def load_text(sample: dict[str, Any]) -> dict[str, bytes]:
    """Members of a checked passage or record."""
    if "at" not in sample:
        text = _read(Path(sample["path"]))
    else:
        with Path(sample["path"]).open("rb") as file:
            file.seek(sample["at"][0])
            record, target, _ = read_record(file.read(sample["at"][1]), sample["fields"])
        if target is not None:
            return {"txt": record.encode(), "target.txt": target.encode()}
        text = record.encode()
    length = sample["context"] + sample["target"]
    start = sample["passage"] * length
    a, b, c = (boundary(text, at) for at in (start, start + sample["context"], start + length))
    return {"txt": text[a:b], "target.txt": text[b:c]}


@lru_cache(maxsize=16)
def _read(path: Path) -> bytes:
    return path.read_bytes()


def boundary(text: bytes, at: int) -> int:
    """The last place up to `at` where a character of UTF-8 begins."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at
