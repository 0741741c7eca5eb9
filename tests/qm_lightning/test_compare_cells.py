"""Cells: names, resumption, and how they are run beside each other."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import compare_cases
import pytest
from rich.console import Console

from qm_lightning.commands import compare
from qm_lightning.comparing.cells import Cell, digest_of, directory_name
from qm_lightning.comparing.schedule import GRACE, Failure, progress_of, run_cells
from qm_lightning.comparing.specs import parse_specs
from qm_lightning.errors import UserError


def run(
    cells: list[Cell], behave: dict[str, Callable[[Path], None]], jobs: int = 1
) -> tuple[list[Failure], list[str], str]:
    """Run stand-ins; failures, finished names, and what was printed."""
    context = multiprocessing.get_context("fork")
    done: list[str] = []

    def start(cell: Cell) -> BaseProcess:
        cell.prepare()
        process = context.Process(target=behave[cell.spec.name], args=(cell.path,))
        process.start()
        return process

    def finish(cell: Cell) -> str:
        done.append(cell.spec.name)
        return cell.result()

    printed = io.StringIO()
    console = Console(file=printed, width=200)
    failures = run_cells(cells, jobs, start, finish, console=console, title="cells", steps=10)
    return failures, done, printed.getvalue()


def test_a_failed_cell_does_not_stop_the_others(tmp_path: Path) -> None:
    names = ["A", "B", "C", "D", "E"]
    behave = dict(
        zip(
            names,
            [
                compare_cases.succeed,
                compare_cases.fail,
                compare_cases.die,
                compare_cases.forget,
                compare_cases.succeed,
            ],
            strict=True,
        )
    )
    failures, done, printed = run([compare_cases.cell(tmp_path, name) for name in names], behave)
    assert done == ["A", "E"]
    assert [(f.cell.spec.name, f.reason) for f in failures] == [
        ("B", "exit code 3"),
        ("C", "killed by SIGKILL (out of memory?)"),
        ("D", "left no results.json"),
    ]
    assert failures[0].lines == [f"line {i}" for i in range(38, 50)]
    assert failures[1].lines == []
    assert "A 4x seed 0: 0.125 nats on 16 tokens" in printed
    assert f"B 4x seed 0: exit code 3; {tmp_path / 'B' / 'log.txt'}" in printed


def test_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    cells = [compare_cases.cell(tmp_path, name) for name in ("A", "B")]
    failures, done, _ = run(cells, dict.fromkeys(("A", "B"), compare_cases.meet), jobs=2)
    assert failures == []
    assert sorted(done) == ["A", "B"]


@pytest.mark.parametrize(("asked", "jobs", "threads"), [(None, 2, 4), ("3", 1, 3), ("9", 4, 2), ("", 99, 1)])
def test_threads_are_a_share_of_the_cores_or_what_omp_asks_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, jobs: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert compare._threads(jobs) == threads


def test_stopping_asks_the_cells_to_save(tmp_path: Path) -> None:
    """Ctrl-C while a cell runs: it gets SIGTERM, its own way out, and nothing further is started."""
    cells = [compare_cases.cell(tmp_path, name) for name in ("A", "B")]

    def interrupt() -> None:
        while not (tmp_path / "A" / "here").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored, and a test run may be one.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(cells, dict.fromkeys(("A", "B"), compare_cases.wait_for_sigterm))
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - started < GRACE
    assert (tmp_path / "A" / "stopped").exists()
    assert not (tmp_path / "B").exists()


def test_a_mistake_in_finish_leaves_no_process_behind(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "foreign").write_text("")
    cells = [compare_cases.cell(tmp_path, name) for name in ("B", "A")]
    with pytest.raises(UserError, match="holds files that no comparison wrote"):
        run(cells, dict.fromkeys(("A", "B"), compare_cases.wait_for_sigterm), jobs=2)
    assert multiprocessing.active_children() == []


def test_finished_means_tested_with_the_same_configuration(tmp_path: Path) -> None:
    cell = compare_cases.cell(tmp_path, "A")
    assert not cell.finished()
    cell.prepare()
    assert not cell.finished()
    compare_cases.succeed(cell.path)
    assert cell.finished()
    assert not compare_cases.cell(tmp_path, "A", digest="other").finished()


def test_another_configuration_clears_the_cell_but_no_foreign_files(tmp_path: Path) -> None:
    cell = compare_cases.cell(tmp_path, "A")
    cell.prepare()
    compare_cases.succeed(cell.path)
    cell.prepare()
    assert cell.finished()
    compare_cases.cell(tmp_path, "A", digest="other").prepare()
    assert [path.name for path in cell.path.iterdir()] == ["cell.json"]
    foreign = compare_cases.cell(tmp_path, "B")
    foreign.path.mkdir()
    (foreign.path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        foreign.prepare()
    assert (foreign.path / "thesis.tex").exists()


def test_a_note_that_was_cut_off_is_no_note(tmp_path: Path) -> None:
    cell = compare_cases.cell(tmp_path, "A")
    cell.prepare()
    compare_cases.succeed(cell.path)
    (cell.path / "cell.json").write_text('{"digest": "d"')
    assert not cell.finished()


def test_fit_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    cell = compare_cases.cell(tmp_path, "A")
    fresh = ["fit", "--config", "x.yaml", "--run_dir", str(cell.path), "--fresh", "true"]
    assert cell.arguments("fit") == fresh
    (cell.path / "checkpoints").mkdir(parents=True)
    (cell.path / "checkpoints" / "step_00000100.ckpt").write_text("")
    assert cell.arguments("fit") == fresh
    (cell.path / "checkpoints" / "last.ckpt").write_text("")
    assert cell.arguments("fit") == [*fresh[:5], "--ckpt_path", "last"]
    assert cell.arguments("test")[-2:] == ["--ckpt_path", "last"]


def test_directories_are_readable_and_never_shared() -> None:
    specs = parse_specs("ToMe,ToFu(mode=mlerp),ToFu(mode=[mlerp]),ToFu(mode=mean)")
    names = [directory_name(spec, c, s) for spec in specs for c in (2.37, 4.0, None) for s in (0, 1)]
    assert len(set(names)) == len(names)
    assert directory_name(specs[0], 2.37, 1) == "ToMe-2.37x-seed1"
    assert all(name.replace("/", "") == name for name in names)


def test_digest_sees_values_not_their_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert len({digest_of(1), digest_of("1"), digest_of([1]), digest_of({"a": 1})}) == 4


def test_progress_of_a_running_cell(tmp_path: Path) -> None:
    cell = compare_cases.cell(tmp_path, "A")
    cell.prepare()
    assert progress_of(cell) == (0, "")
    (cell.path / "metrics.csv").write_text("step,train/loss/target,val/quality/nats\n10,2.5,\n")
    assert progress_of(cell) == (10, "train 2.500 nats")
    with (cell.path / "metrics.csv").open("a") as file:
        file.write("20,2.0,\n20,,1.75\n30,1.9,\n")
    assert progress_of(cell) == (30, "val 1.750 nats")
