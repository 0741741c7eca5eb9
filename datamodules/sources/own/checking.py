"""Looks at every file before a shard is written: what is bad is left out with its reason, and counted.

The findings go to a journal as they come, so an interrupted check goes on where it stopped. Shards are then
written from the good files alone: their number is known, and a bad file cannot leave a hole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import DataError
from datamodules.shards.files import write_atomic
from datamodules.shards.processes import map_files
from datamodules.shards.progress import track

JOURNAL_NAME = "checked.jsonl"
SKIPPED_NAME = "skipped.jsonl"
OnBad = Literal["skip", "raise"]
Check = Callable[[dict[str, Any]], list["Found"]]
"""Looks at an item (JSON values) and says what was found in it: one or more samples or reasons."""


class BadFileError(Exception):
    """A file that cannot be used: the kind of trouble, which is counted, and the trouble itself."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Found:
    """What a check found: a sample, or the reason why there is none.

    Attributes:
        name: file, or place in a file, for people.
        sample: what the source needs to make the sample, as JSON values; ``None``: it is bad.
        kind: of the trouble.
        detail: of the trouble.
    """

    name: str
    sample: dict[str, Any] | None = None
    kind: str = ""
    detail: str = ""


@dataclass
class Findings:
    """All samples that were found, in the order of the items, and all trouble."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Found] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """Count one finding."""
        if found.sample is None:
            self.skipped.append(found)
        else:
            self.samples.append(found.sample)

    def report(self, out: Path) -> None:
        """Print how many were skipped and why, with an example each; the whole list goes to a file."""
        print(f"{len(self.samples)} samples found, {len(self.skipped)} files or records skipped")
        for kind, count in Counter(f.kind for f in self.skipped).most_common():
            example = next(f for f in self.skipped if f.kind == kind)
            line = f"  {count} x {kind}, such as {example.name}" + (
                f" ({example.detail})" if example.detail else ""
            )
            print(line.encode("utf-8", "backslashreplace").decode())
        lines = [
            json.dumps({"name": f.name, "reason": f.kind, "detail": f.detail}) + "\n" for f in self.skipped
        ]
        write_atomic(out / SKIPPED_NAME, "".join(lines).encode())
        if self.skipped:
            print(f"  all of them: {out / SKIPPED_NAME}")


def check_items(
    items: Sequence[dict[str, Any]],
    check: Check,
    out: Path,
    *,
    settings: dict[str, Any],
    workers: int,
    on_bad: OnBad = "skip",
) -> Findings:
    """Check items side by side, with a progress bar; what an interrupted run checked is not checked again.

    Args:
        items: what to check; ``name`` and, for a file, ``stamp`` tell whether an item is still the same.
        check: called in worker processes; must be picklable. Trouble is `BadFileError`.
        out: folder of the data set, where the journal is kept.
        settings: what the check depends on; a journal with others is begun anew.
        workers: processes.
        on_bad: ``skip`` counts bad files, ``raise`` stops at the first.

    Raises:
        DataError: a bad file under ``raise``, or not one good file.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = out / JOURNAL_NAME
    known = _read_journal(journal, settings)
    todo = [item for item in items if _identity(item) not in known]
    if not known:
        write_atomic(journal, _line({"settings": settings}))
    if len(todo) < len(items):
        print(f"{len(items) - len(todo)} of {len(items)} files were checked by an earlier run")
    with journal.open("ab") as file:
        for item, found in _run(todo, check, workers):
            known[_identity(item)] = found
            file.write(_line({"item": _identity(item), "found": [vars(f) for f in found]}))
            file.flush()
            if on_bad == "raise" and (bad := next((f for f in found if f.sample is None), None)):
                raise DataError(
                    f"{bad.name}: {bad.kind} ({bad.detail}); mend or remove it, or pass --on_error skip"
                )
    findings = Findings()
    for item in items:
        for one in known[_identity(item)]:
            findings.add(one)
    return findings


def _run(
    items: list[dict[str, Any]], check: Check, workers: int
) -> Iterator[tuple[dict[str, Any], list[Found]]]:
    processes = workers if len(items) > workers else 1
    found = map_files(partial(_guarded, check=check), items, processes, at_a_time=16)
    yield from zip(items, track(found, "checking files", len(items)), strict=True)


def _guarded(item: dict[str, Any], check: Check) -> list[Found]:
    try:
        return check(item)
    except BadFileError as error:
        return [Found(item["name"], None, error.kind, error.detail)]
    except OSError as error:
        return [Found(item["name"], None, "cannot be read", error.strerror or str(error))]


def _identity(item: dict[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def _line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()  # ASCII: a file's name need not be Unicode


def _read_journal(path: Path, settings: dict[str, Any]) -> dict[str, list[Found]]:
    """Findings by item; nothing if there is no journal, or one of other settings."""
    known: dict[str, list[Found]] = {}
    if not path.is_file():
        return known
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        if json.loads(lines[0])["settings"] != json.loads(json.dumps(settings)):
            return known
        for line in lines[1:]:
            content = json.loads(line)
            known[content["item"]] = [Found(**f) for f in content["found"]]
    except (ValueError, KeyError, IndexError, TypeError):
        # A kill may have cut the last line: what came before it holds, and it is written anew without it.
        good = [_line({"settings": settings})]
        good += [_line({"item": i, "found": [vars(f) for f in found]}) for i, found in known.items()]
        write_atomic(path, b"".join(good))
    return known
