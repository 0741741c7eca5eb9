"""`python -m datamodules prepare | index | verify`: make shards, index shards from anywhere, check them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.errors import DataError, outside_environment

MODALITIES = ("text", "image", "video", "paired")
SHIPPED = ("digits", "stdlib")  # names of sources that ship; everything else is a path


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m datamodules", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    index = verbs.add_parser("index", help="index shards from anywhere, and verify them")
    index.add_argument("root")
    index.add_argument("--exclude-bad", action="store_true", help="leave damaged shards out, on record")
    index.add_argument(
        "--split", action="append", default=[], metavar="SPLIT=PATTERN",
        help="make a split of one folder's shards, such as train='part-000[0-8]*.tar'; may be repeated",
    )  # fmt: skip
    index.add_argument("--fields", default="", help="fields that every sample must have, such as jpg,txt")
    verify = verbs.add_parser("verify", help="check shards against their index")
    verify.add_argument("root")
    verify.add_argument("--sha256", action="store_true", help="compare checksums as well")
    for verb in (index, verify):
        verb.add_argument("--workers", type=int, help="processes (default: all cores for 256 MB and more)")
    prepare = verbs.add_parser("prepare", help="make shards with their index")
    modalities = prepare.add_subparsers(dest="modality", required=True)
    for modality in MODALITIES:
        sub = modalities.add_parser(modality)
        if modality in argv:  # a source's options load numpy and more: only when asked for
            _source(modality, _given_source(argv)).add_arguments(sub)
        sub.add_argument("--source", required=True, help="name of a source that ships, or a folder")
        sub.add_argument("--out", type=Path, required=True, help="folder of the data set")
    return parser


def _given_source(argv: list[str]) -> str:
    """The value of --source, before the parser for it is known: a folder's options are not a shipped source's."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--source", default="")
    try:
        return str(peek.parse_known_args(argv)[0].source)
    except argparse.ArgumentError:
        return ""


def _source(modality: str, source: str) -> Any:
    """What makes shards of a modality: out of one's own files if the source is a path, else of what ships."""
    path = Path(source)
    own = source not in ("", *SHIPPED) and (path.exists() or path.name != source)
    if own and not path.exists():
        raise DataError(
            f"there is no source {source!r}, expected a folder or file of your own; check the path"
        )
    return importlib.import_module(f"datamodules.sources.{'own.' if own else ''}{modality}")


def _each(folders: Iterable[Path], work: Callable[[Path], int | None]) -> int:
    """Work on every folder, whatever another one comes to; the exit code."""
    code = 0
    for folder in folders:
        try:
            code = max(code, int((work(folder) or 0) > 0))
        except DataError as error:
            code = _refuse(str(error))
    return code


def _refuse(reason: str) -> int:
    print("error: " + " ".join(reason.split()), file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    options = vars(_parser(arguments).parse_args(arguments))
    verb = options.pop("verb")
    if verb == "prepare":
        modality, source, out = options.pop("modality"), options.pop("source"), options.pop("out")
        _source(modality, source).prepare(source, out, **options)
        return 0
    # Imported here: outside the project's environment `main` says in one line what is missing.
    from datamodules.shards.checking import verify_folder
    from datamodules.shards.folders import shard_folders
    from datamodules.shards.indexing import index_folder
    from datamodules.shards.linking import link_splits

    root, splits, workers = options["root"], options.get("split"), options["workers"]
    if verb == "index":
        folders = link_splits(Path(root), splits) if splits else shard_folders(root)
        fields = [field for field in options["fields"].split(",") if field]
        index = partial(index_folder, exclude_bad=options["exclude_bad"], fields=fields, workers=workers)
        return _each(folders, index)
    verify = partial(verify_folder, checksum=options["sha256"], workers=workers)
    return _each(shard_folders(root, indexed=True), verify)


def main(argv: list[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line and exit code 2, damaged shards are exit code 1."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except DataError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(outside_environment(error))
    except OSError as error:  # a full disk, a folder that may not be written
        where = f": {error.filename}" if error.filename else ""
        return _refuse(
            f"{error.strerror or error}{where}; expected room and permission to read and write; mend that and give "
            "the same command again: what is finished is kept"
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on: what is finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
