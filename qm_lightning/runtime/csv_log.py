"""metrics.csv in the run directory, which a resume continues instead of replacing."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from qm_lightning.runtime.run_directory import write_text


class AppendingWriter(ExperimentWriter):
    """Lightning's writer, without its habit of deleting the file that it finds, and with one for full disks."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._failing = False

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Nothing: config.yaml holds the whole configuration."""

    def save(self) -> None:
        """Write what has gathered; if that fails, say so once and try again with the next rows."""
        if not self.metrics:
            return
        path, known = Path(self.metrics_file_path), list(self.metrics_keys)
        size = path.stat().st_size if path.is_file() else 0
        try:
            if self._record_new_keys() or not size:
                old = _read_rows(path) if size else []
                write_text(path, self._text([*old, *self.metrics], header=True))
            else:
                with path.open("a", newline="") as file:
                    file.write(self._text(self.metrics))
        except OSError as error:
            self.metrics_keys = known
            if size:
                os.truncate(path, size)  # half a row may be there
            if not self._failing:
                print(f"warning: could not write {path}: {error.strerror}", file=sys.stderr, flush=True)
            self._failing = True
            return
        self.metrics, self._failing = [], False

    def _text(self, rows: Sequence[Mapping[str, Any]], header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, writing ``metrics.csv`` straight into the run directory.

    Args:
        run_dir: the run's directory.
        start_step: optimizer steps behind the checkpoint that training goes on from: rows that were logged
            after it, before a crash, are dropped, so that no step appears twice. ``None``: keep all rows.
    """

    def __init__(self, run_dir: Path, start_step: int | None = None) -> None:
        # A row is on disk once it is logged: a killed training misses none, and `tail -f` shows where one is.
        super().__init__(save_dir=run_dir, name="", version="", flush_logs_every_n_steps=1)
        self._start_step = start_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made at the first use; a dummy on all ranks but 0."""
        if self._experiment is None:
            if self._start_step is not None:
                drop_rows_from(Path(self.log_dir) / "metrics.csv", self._start_step)
            self._experiment = AppendingWriter(log_dir=self.log_dir)
        return self._experiment


def drop_rows_from(path: Path, step: int) -> None:
    """Remove the rows of a metrics.csv whose ``step`` (counted from 0) is ``step`` or later."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if "step" not in header:
        return
    column = header.index("step")
    kept = [
        row for row in rows if len(row) == len(header) and row[column].isdigit() and int(row[column]) < step
    ]
    if len(kept) < len(rows):
        write_text(path, "\n".join([",".join(header), *(",".join(row) for row in kept)]) + "\n")
