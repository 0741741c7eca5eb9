"""`python -m datamodules prepare image --source FOLDER`: anyone's pictures, with class names or captions."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from datamodules.errors import DataError
from datamodules.shards.decode import Limits, decode_image
from datamodules.sources.encoding import png_bytes
from datamodules.sources.own.checking import BadFileError, Found
from datamodules.sources.own.files import files_below, named_split, say_left_aside, split_folders, stamp
from datamodules.sources.own.preparing import Options, add_own_arguments, prepare_own
from datamodules.sources.splits import Split

STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kept byte for byte
CONVERTED = ("BMP", "GIF", "TIFF", "PPM")  # stored as PNG, without loss
MISSING = ("file is missing", "the table names it")
Table = dict[str, list[tuple[str, str]]]  # (text, split or "") of each row, by path
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare image` for a folder."""
    add_table_arguments(parser)
    add_own_arguments(parser)


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a table that names the texts of pictures or clips."""
    parser.add_argument("--captions", type=Path, help="CSV with a row per sample, instead of class folders")
    parser.add_argument("--file_column", default="file", help="its column of paths below the source")
    parser.add_argument("--caption_column", default="caption", help="its column of captions or class names")


def prepare(
    source: str,
    out: Path,
    *,
    captions: Path | None = None,
    file_column: str = "file",
    caption_column: str = "caption",
    **options: Any,
) -> None:
    """Write shards of pictures (`jpg`, `png` or `webp`) and their texts (`txt`).

    A picture's text is its row in the CSV, else the `.txt` file beside it, else its class folder's name.

    Args:
        source: a folder: `CLASS/x.jpg`, or `train/CLASS/x.jpg`, `val/...`, `test/...`.
        out: the data set's folder.
        captions: the CSV, with a header; a `split` column deals its rows to splits.
        file_column: its column of paths below the source.
        caption_column: its column of texts.
        **options: see `Options`.

    Raises:
        DataError: nothing that can be used, or a table without the columns.
    """
    root = Path(source)
    table = None if captions is None else read_table(captions, file_column, caption_column)
    items = picture_items(root, table)
    say_left_aside(root, (*SUFFIXES, ".txt", ".csv"))
    recipe = {"modality": "image", "source": str(root.resolve()), "captions": captions and str(captions)}
    prepare_own(out, items, check_picture, load_picture, recipe, Options(**options))


def read_table(path: Path, file_column: str, text_column: str) -> Table:
    """Read a CSV of captions.

    Returns:
        (caption, split or "") of each row by path: several captions of a picture are several rows.

    Raises:
        DataError: there is no such file, it is no UTF-8, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"there is no table {path}; expected a CSV of captions; check --captions")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            found = list(rows.fieldnames or ())
            if missing := [c for c in (file_column, text_column) if c not in found]:
                raise DataError(
                    f"{path} has the columns {', '.join(found) or 'none'} and lacks {', '.join(missing)}; name yours "
                    "with --file_column and --caption_column"
                )
            table: Table = {}
            for row in rows:
                name = Path(row[file_column].strip()).as_posix()  # "./a//b.jpg" is "a/b.jpg"
                table.setdefault(name, []).append((row[text_column].strip(), row.get("split") or ""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a CSV in UTF-8") from None
    for name, found_rows in table.items():
        for _, split in found_rows:
            if split and named_split(split) is None:
                raise DataError(f"{path} puts {name} into the split {split!r}, expected train, val or test")
    return table


def picture_items(root: Path, table: Table | None) -> list[dict[str, Any]]:
    """All pictures, as items to check: name, path, stamp, text (None: there is none), split.

    Rows of the table without a file become items as well: they are counted as missing.

    Raises:
        DataError: no picture, or no text for any.
    """
    folders = split_folders(root) if table is None else {}
    roots: list[tuple[str | None, Path]] = [*folders.items()] or [(None, root)]
    items = []
    for split, folder in roots:
        for path in files_below(folder, SUFFIXES):
            name = path.relative_to(root).as_posix()
            item = {"name": name, "path": str(path), "stamp": stamp(path)}
            rows = rows_of(name, table) if table is not None else [(_text_of(path, folder), None)]
            items += [{**item, "text": text, "split": own_split or split} for text, own_split in rows]
    if not items:
        raise DataError(f"found no pictures below {root}, expected {', '.join(SUFFIXES)}; check --source")
    if all(item["text"] is None for item in items):
        raise DataError(
            f"the {len(items)} pictures below {root} have no texts; expected class folders ({root}/CLASS/x.jpg), "
            "x.txt beside x.jpg, or --captions TABLE.csv with their paths below the source"
        )
    return items + missing_items(items, table)


def rows_of(name: str, table: Table) -> list[tuple[str | None, Split | None]]:
    """Text and split of each of a file's rows; one without a text if the table does not name it."""
    return [(text, named_split(split)) for text, split in table[name]] if name in table else [(None, None)]


def missing_items(items: list[dict[str, Any]], table: Table | None) -> list[dict[str, Any]]:
    """Items without a path for what a table names and nobody found: they are counted as missing."""
    known = {item["name"] for item in items}
    return [{"name": name, "path": None} for name in table or () if name not in known]


def _text_of(path: Path, folder: Path) -> str | None:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_bytes().decode("utf-8", "surrogateescape").strip()
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else None


def check_picture(item: dict[str, Any]) -> list[Found]:
    """Decode one picture in full.

    Raises:
        BadFileError: it cannot be used.
    """
    if item["path"] is None:
        raise BadFileError(*MISSING)
    if item["text"] is None:
        raise BadFileError("no text", "neither row, nor .txt file, nor class folder")
    if not item["text"]:
        raise BadFileError("text is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in item["text"]):
        raise BadFileError("text is not UTF-8")
    extension = picture_extension(Path(item["path"]))
    sample = {k: item[k] for k in ("name", "path", "text", "split")}
    return [Found(item["name"], {**sample, "name": item["name"].rpartition(".")[0], "as": extension})]


def picture_extension(path: Path) -> str:
    """The member that a picture is stored as, after decoding it in full.

    Raises:
        BadFileError: it is empty, damaged, too large, animated or no picture.
    """
    data = path.read_bytes()
    if not data:
        raise BadFileError("file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=(*STORED, *CONVERTED)) as picture:
            kind = str(picture.format)
            extension = STORED.get("JPEG" if kind == "MPO" else kind, "png")
            if extension == "png" and kind != "PNG":
                _convert(picture)
                return extension
        decode_image(data)
    except UnidentifiedImageError:
        raise BadFileError("not a picture") from None
    except (DataError, Image.DecompressionBombError) as error:
        raise BadFileError("refused", str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadFileError("damaged", str(error)) from None
    return extension


def _convert(picture: Image.Image) -> bytes:
    if (pixels := picture.width * picture.height) > Limits().pixels:
        raise DataError(f"{pixels} pixels, allowed are {Limits().pixels}")
    if getattr(picture, "n_frames", 1) > 1:
        raise DataError(f"animated: {getattr(picture, 'n_frames', 1)} frames, expected one picture")
    picture.load()
    deep = picture.mode in ("I", "F", "I;16", "I;16B", "I;16L")
    plain = picture if picture.mode in ("L", "RGB", "RGBA") or deep else picture.convert("RGBA")
    if deep:  # decode_image scales 16 bits; a PNG holds them as they are
        file = io.BytesIO()
        plain.save(file, "PNG")
        return file.getvalue()
    return png_bytes(np.asarray(plain))


def load_picture(sample: dict[str, Any]) -> dict[str, bytes]:
    """Members of a checked picture."""
    data = Path(sample["path"]).read_bytes()
    with Image.open(io.BytesIO(data), formats=(*STORED, *CONVERTED)) as picture:
        if sample["as"] == "png" and picture.format != "PNG":
            data = _convert(picture)
    return {sample["as"]: data, "txt": sample["text"].encode()}
