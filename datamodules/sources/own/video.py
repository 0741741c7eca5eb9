"""`python -m datamodules prepare video --source FOLDER`: anyone's videos, or folders of frames."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.errors import DataError
from datamodules.processing.clips import CONTAINERS, open_clip
from datamodules.sources.own.checking import BadFileError, Found
from datamodules.sources.own.files import files_below, say_left_aside, split_folders, stamp
from datamodules.sources.own.image import (
    MISSING,
    Table,
    add_table_arguments,
    missing_items,
    picture_extension,
    read_table,
    rows_of,
)
from datamodules.sources.own.preparing import Options, add_own_arguments, prepare_own

FRAMES = (".jpg", ".jpeg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare video` for a folder."""
    parser.add_argument("--min_frames", type=int, default=1, help="shorter clips are skipped")
    add_table_arguments(parser)
    add_own_arguments(parser)


def prepare(
    source: str,
    out: Path,
    *,
    min_frames: int = 1,
    captions: Path | None = None,
    file_column: str = "file",
    caption_column: str = "caption",
    **options: Any,
) -> None:
    """Write shards of clips (`mp4` and the like as they are; frames as numbered pictures) and texts (`txt`).

    Args:
        source: a folder of `CLASS/x.mp4` or `CLASS/clip/000.jpg`, also below `train/`, `val/`, `test/`.
        out: the data set's folder.
        min_frames: shorter clips are skipped.
        captions: a CSV, with a header; paths are those of video files or of frame folders.
        file_column: its column of paths below the source.
        caption_column: its column of texts.
        **options: see `Options`.

    Raises:
        DataError: nothing that can be used, or a video file without PyAV.
    """
    root = Path(source)
    table = None if captions is None else read_table(captions, file_column, caption_column)
    items = [{**item, "min_frames": min_frames} for item in clip_items(root, table)]
    say_left_aside(root, (*FRAMES, *(f".{c}" for c in CONTAINERS), ".csv"))
    recipe = {
        "modality": "video",
        "source": str(root.resolve()),
        "captions": captions and str(captions),
        "min_frames": min_frames,
    }
    prepare_own(out, items, check_clip, load_clip, recipe, Options(**options))


def clip_items(root: Path, table: Table | None) -> list[dict[str, Any]]:
    """Clips to check: name, path (a file, or a folder of frames), stamp, text, split.

    Raises:
        DataError: there is none.
    """
    folders = split_folders(root) if table is None else {}
    roots: list[tuple[str | None, Path]] = [*folders.items()] or [(None, root)]
    items: list[dict[str, Any]] = []
    for split, folder in roots:
        videos = files_below(folder, [f".{c}" for c in CONTAINERS])
        frames = sorted({path.parent for path in files_below(folder, FRAMES)} - {folder})
        for path in [*videos, *frames]:
            name = path.relative_to(root).as_posix()
            parts = path.relative_to(folder).parts
            contents = [stamp(path)] if path.is_file() else [stamp(f) for f in frame_files(path)]
            item = {"name": name, "path": str(path), "stamp": contents}
            class_name = parts[0] if len(parts) > 1 else None
            rows = rows_of(name, table) if table is not None else [(class_name, None)]
            items += [{**item, "text": text, "split": own_split or split} for text, own_split in rows]
    if not items:
        raise DataError(
            f"found no clips below {root}, expected video files ({', '.join(CONTAINERS)}) or folders of frames; "
            "check --source"
        )
    return items + missing_items(items, table)


def frame_files(folder: Path) -> list[Path]:
    """A clip's frames, in the order of the numbers in their names."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in FRAMES and not p.name.startswith(".")]
    return sorted(files, key=lambda p: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", p.name)])


def check_clip(item: dict[str, Any]) -> list[Found]:
    """Read one clip in full.

    Raises:
        BadFileError: it cannot be used.
    """
    if item["path"] is None:
        raise BadFileError(*MISSING)
    if item["text"] is None:
        raise BadFileError("no text", "neither a row nor a class folder")
    if not item["text"]:
        raise BadFileError("text is empty")
    path = Path(item["path"])
    frames = _check_frames(path) if path.is_dir() else _check_video(path)
    if frames < item["min_frames"]:
        raise BadFileError("clip is too short", f"{frames} frames, expected {item['min_frames']}")
    name = item["name"] if path.is_dir() else item["name"].rpartition(".")[0]
    return [Found(item["name"], {**{k: item[k] for k in ("path", "text", "split")}, "name": name})]


def _check_frames(folder: Path) -> int:
    files = frame_files(folder)
    sizes: dict[tuple[int, int], str] = {}
    for path in files:
        try:
            picture_extension(path)
        except BadFileError as error:
            raise BadFileError(f"frame is bad: {error.kind}", f"{path.name} {error.detail}".strip()) from None
        with Image.open(path) as picture:
            sizes.setdefault(picture.size, path.name)
    if len(sizes) > 1:
        seen = ", ".join(f"{name} is {w} x {h}" for (w, h), name in [*sizes.items()][:2])
        raise BadFileError("frames differ in size", seen)
    return len(files)


def _check_video(path: Path) -> int:
    data = path.read_bytes()
    if not data:
        raise BadFileError("file is empty")
    try:
        clip = open_clip({path.suffix[1:].lower(): data})
        if len(clip):
            clip.read([0, len(clip) - 1] if len(clip) > 1 else [0])
    except DataError as error:
        if "PyAV" in str(error) and "not installed" in str(error):
            raise
        raise BadFileError("damaged", str(error)) from None
    return len(clip)


def load_clip(sample: dict[str, Any]) -> dict[str, bytes]:
    """Members of a checked clip."""
    path = Path(sample["path"])
    members = {"txt": sample["text"].encode()}
    if path.is_file():
        return {path.suffix[1:].lower(): path.read_bytes(), **members}
    frames = {f"{i:06d}.{_extension(p)}": p.read_bytes() for i, p in enumerate(frame_files(path))}
    return {**frames, **members}


def _extension(path: Path) -> str:
    return "jpg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
