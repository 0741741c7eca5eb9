"""`python -m datamodules prepare | index | verify`: make shards, index shards from anywhere, check them."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from datamodules.errors import DataError
from datamodules.shards.files import sha256_of
from datamodules.shards.index import build_index, index_path, load_offsets, scan
from datamodules.shards.manifest import Manifest, ShardEntry
from datamodules.shards.tar import CorruptShardError

MODALITIES = ("text", "image", "video", "paired")


def _folders(root: Path) -> list[Path]:
    folders = sorted({path.parent for path in root.rglob("*.tar")})
    if not folders:
        raise DataError(f"no *.tar under {root}; expected a folder of WebDataset shards; check the path")
    return folders


def index_folder(folder: Path, *, exclude_bad: bool) -> int:
    """Index every shard of a folder and write its manifest.

    Args:
        folder: a split's folder.
        exclude_bad: leave damaged shards out, on record, instead of refusing the folder.

    Returns:
        Number of damaged shards.
    """
    entries: list[ShardEntry] = []
    bad: list[tuple[str, str]] = []
    for path in track(sorted(folder.glob("*.tar")), description=f"indexing {folder}"):
        try:
            entries.append(build_index(path))
        except CorruptShardError as error:
            bad.append((path.name, str(error)))
            print(f"bad   {path}: {error}", file=sys.stderr)
    if bad and not exclude_bad:
        raise DataError(
            f"{len(bad)} of {len(bad) + len(entries)} shards in {folder} are damaged; mend them, "
            "or leave them out on record with --exclude-bad"
        )
    manifest = Manifest(tuple(entries), tuple(bad))
    manifest.save(folder)
    print(
        f"good  {folder}: {len(entries)} shards, {manifest.total} samples, fingerprint {manifest.fingerprint}"
    )
    return len(bad)


def verify_folder(folder: Path, *, checksum: bool) -> int:
    """Check a folder's shards against its manifest.

    Args:
        folder: a split's folder.
        checksum: also compare sha256, which alone shows flipped data bytes.

    Returns:
        Number of shards that disagree.
    """
    manifest = Manifest.load(folder)
    bad = 0
    for entry in track(manifest.shards, description=f"verifying {folder}"):
        reason = _disagreement(folder / entry.name, entry, checksum=checksum)
        if reason:
            bad += 1
            print(f"bad   {folder / entry.name}: {reason}", file=sys.stderr)
    print(
        f"{'bad ' if bad else 'good'}  {folder}: {len(manifest.shards) - bad} of {len(manifest.shards)} shards agree"
    )
    return bad


def _disagreement(path: Path, entry: ShardEntry, *, checksum: bool) -> str | None:
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != entry.bytes:
        return f"{path.stat().st_size} bytes, the manifest says {entry.bytes}"
    try:
        offsets, _, _ = scan(path)
        if load_offsets(index_path(path)).tolist() != offsets:
            return "its index does not fit; run python -m datamodules index"
    except DataError as error:
        return str(error)
    if checksum and entry.sha256 and sha256_of(path) != entry.sha256:
        return "the checksum differs: bytes were changed"
    return None


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m datamodules", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    index = verbs.add_parser("index", help="index shards from anywhere, and verify them")
    index.add_argument("root", type=Path)
    index.add_argument("--exclude-bad", action="store_true", help="leave damaged shards out, on record")
    verify = verbs.add_parser("verify", help="check shards against their index")
    verify.add_argument("root", type=Path)
    verify.add_argument("--sha256", action="store_true", help="compare checksums as well")
    prepare = verbs.add_parser("prepare", help="make shards with their index")
    modalities = prepare.add_subparsers(dest="modality", required=True)
    for modality in MODALITIES:
        sub = modalities.add_parser(modality)
        if modality in argv:  # a source's options load numpy and more: only when asked for
            _source(modality).add_arguments(sub)
        sub.add_argument("--source", required=True, help="name of a source that ships, or a folder")
        sub.add_argument("--out", type=Path, required=True, help="folder of the data set")
    return parser


def _source(modality: str) -> Any:
    try:
        return importlib.import_module(f"datamodules.sources.{modality}")
    except ModuleNotFoundError as error:
        raise DataError(
            f"there is no source for {modality!r} yet ({error}); expected one of image, text, video"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line and exit code 2, damaged shards are exit code 1."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = vars(_parser(arguments).parse_args(arguments))
        verb = options.pop("verb")
        if verb == "prepare":
            modality, source, out = options.pop("modality"), options.pop("source"), options.pop("out")
            _source(modality).prepare(source, out, **options)
            return 0
        folders = _folders(options["root"])
        if verb == "index":
            bad = sum(index_folder(f, exclude_bad=options["exclude_bad"]) for f in folders)
            return 0 if options["exclude_bad"] else int(bool(bad))
        return int(sum(verify_folder(f, checksum=options["sha256"]) for f in folders) > 0)
    except DataError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
