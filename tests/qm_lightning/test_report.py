"""The report: reading runs, naming methods, means over seeds, the page and its files."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_cases import FULL_LOSS, LOSSES, results, write_comparison, write_run
from rich.console import Console

from qm_lightning.cli import main
from qm_lightning.errors import UserError
from qm_lightning.report import default_directory, print_report, write_report
from qm_lightning.reporting.columns import BITS, COLUMNS, best_rows, cell, count, number, shown
from qm_lightning.reporting.curves import mean_curve, read_curves, smoothed
from qm_lightning.reporting.rows import QUALITY, pareto_front, put_together
from qm_lightning.reporting.runs import find_results, read_runs


def read(*directories: Path) -> list[Any]:
    return read_runs(find_results(directories))[0]


def column(key: str) -> Any:
    return next(c for c in COLUMNS if c.key == key)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("runs"), seeds=2, compressions=(2.37, 8.0))


@pytest.fixture(scope="module")
def page(comparison: Path) -> Path:
    return write_report([comparison]).page


def test_page_holds_everything_and_points_nowhere_else(comparison: Path, page: Path) -> None:
    assert page == comparison / "report" / "index.html"
    html = page.read_text()
    for method in (*LOSSES, "NoMerge"):
        assert method in html
    assert html.count("<img") == html.count('src="data:image/png;base64,') == 4
    assert "http://" not in html
    assert "https://" not in html
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        "runs.csv",
        "summary.csv",
        *(f"image-{name}.png" for name in ("pareto", "tokens", "time", "kept", "curves")),
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in page.parent.glob("*.png"))


def test_runs_csv_has_one_row_per_run_with_its_figures(comparison: Path, page: Path) -> None:
    with (page.parent / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * len(LOSSES))
    row = next(r for r in rows if (r["method"], r["compression_target"], r["seed"]) == ("ToMe", "8.0", "1"))
    stored = json.loads((comparison / "ToMe-8.0-1" / "results.json").read_text())
    assert float(row["quality/nats"]) == stored["metrics"]["quality/nats"]
    assert float(row["ms_per_sample"]) == stored["cost"]["ms_per_sample"]


def test_summary_csv_holds_mean_and_sample_standard_deviation(comparison: Path, page: Path) -> None:
    values = [
        json.loads((comparison / f"ToMe-8.0-{seed}" / "results.json").read_text())["metrics"]["quality/nats"]
        for seed in range(2)
    ]
    with (page.parent / "summary.csv").open() as file:
        row = next(
            r for r in csv.DictReader(file) if (r["method"], r["compression_target"]) == ("ToMe", "8.0")
        )
    assert float(row["quality/nats mean"]) == pytest.approx(statistics.fmean(values))
    assert float(row["quality/nats std"]) == pytest.approx(statistics.stdev(values))


def test_verb_prints_the_table_and_the_place(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(comparison), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "QuickMerge 2.37x" in printed
    assert "has the lowest loss" in printed
    assert str(tmp_path / "out" / "index.html") in printed.replace("\n", "")


def test_table_fits_80_columns(comparison: Path, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "log").open("w"))
    print_report(write_report([comparison], tmp_path / "out"), console)
    printed = console.export_text()
    assert max(len(line) for line in printed.splitlines() if "report:" not in line) <= 80
    row = next(line for line in printed.splitlines() if "UniformPool 8x" in line)
    assert (
        len(row.replace("\u00b1", "").split()) == 9
    )  # name and compression, mean and spread, five further figures


def test_old_files_without_most_keys_still_give_a_report(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"merger": "ToMe", "metrics": {"quality/nats": 0.2}}, curves=False)
    write_run(tmp_path / "b", {}, curves=False)
    write_run(
        tmp_path / "c", {"merger": "NoMerge", "metrics": None, "cost": {"ms_per_sample": 1.0}}, curves=False
    )
    html = write_report([tmp_path]).page.read_text()
    assert "ToMe" in html
    assert "unknown" in html


def test_not_a_number_is_absent_not_a_winner(tmp_path: Path) -> None:
    broken = results("ToMe", 4.0, 0, math.nan)
    write_run(tmp_path / "a", broken, curves=False)
    write_run(tmp_path / "b", results("UniformPool", 4.0, 0, 0.2), curves=False)
    rows = put_together(read(tmp_path))
    assert [row.method for row in rows] == ["UniformPool", "ToMe"]
    assert cell(rows[1], column(QUALITY)) == "-"
    assert best_rows(rows, column(QUALITY)) == {0}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"metrics": {"quality/nats"', '{"compression_target": "much"}']
)
def test_unreadable_results_are_named_and_the_others_reported(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "good", results("ToMe", 4.0, 0, 0.2), curves=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.json").write_text(content)
    report = write_report([tmp_path])
    assert len(report.left_out) == 1
    assert str(tmp_path / "bad" / "results.json") in report.left_out[0]
    assert report.left_out[0].partition(":")[0] in report.page.read_text()


def test_a_repeated_run_is_no_further_seed(tmp_path: Path) -> None:
    for place, loss in enumerate((0.2, 0.3)):
        run = write_run(tmp_path / str(place), results("ToMe", 4.0, 0, loss), curves=False)
        os.utime(run / "results.json", ns=(place * 10**9, place * 10**9))
    runs, left_out = read_runs(find_results([tmp_path]))
    assert [run.path.name for run in runs] == ["1"]
    assert len(left_out) == 1
    assert str(tmp_path / "0") in left_out[0]


def test_a_method_is_named_with_the_arguments_in_which_its_runs_differ(tmp_path: Path) -> None:
    entropy = results("QuickMerge", 4.0, 0, 0.1)
    fixed = results("QuickMerge", 4.0, 0, 0.2)
    fixed["budget"] = "FixedBudget"
    fixed["merger_args"] = {
        "budget": {"class_path": "q.FixedBudget", "init_args": {"compression": 4.0, "x": 1}}
    }
    local = results("QuickMerge", 4.0, 0, 0.3)
    local["merger_args"]["locality"] = 0.5
    entropy["merger_args"]["locality"] = fixed["merger_args"]["locality"] = 0.1
    for name, content in (("e", entropy), ("f", fixed), ("l", local)):
        write_run(tmp_path / name, content, curves=False)
    assert {run.path.name: run.method for run in read(tmp_path)} == {
        "e": "QuickMerge(budget=EntropyBudget, locality=0.1)",
        "f": "QuickMerge(budget=FixedBudget, locality=0.1)",
        "l": "QuickMerge(budget=EntropyBudget, locality=0.5)",
    }


def test_compressions_alone_do_not_make_another_method(comparison: Path) -> None:
    assert {run.method for run in read(comparison)} == {*LOSSES, "NoMerge"}


def test_label_of_a_comparison_wins(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", results("ToFu", 4.0, 0, 0.1), curves=False)
    (run / "cell.json").write_text(json.dumps({"label": "ToFu(mode=mlerp)"}))
    assert read(tmp_path)[0].method == "ToFu(mode=mlerp)"


def test_experiments_get_their_own_section(tmp_path: Path) -> None:
    for name in ("image", "text"):
        for seed in range(2):
            content = results("ToMe", 4.0, seed, 0.2) | {"experiment": name, "modality": name}
            write_run(tmp_path / name / str(seed), content, curves=False)
    report = write_report([tmp_path / "image", tmp_path / "text"])
    assert report.page == tmp_path / "report" / "index.html"
    assert [section.experiment for section in report.sections] == ["image", "text"]
    assert BITS not in report.sections[0].columns
    assert BITS in report.sections[1].columns


def test_all_tokens_come_first_then_compressions_best_first(comparison: Path) -> None:
    rows = put_together(read(comparison))
    assert rows[0].method == "NoMerge"
    assert [row.target for row in rows[1:]] == [2.37] * 5 + [8.0] * 5
    losses = [row.mean(QUALITY) for row in rows[1:6]]
    assert losses == sorted(losses)
    assert abs(rows[0].mean(QUALITY) / FULL_LOSS - 1) < 0.1


def test_best_of_a_compression_is_marked_by_direction(tmp_path: Path) -> None:
    for name, loss, exact in (("ToMe", 0.1, 0.2), ("UniformPool", 0.3, 0.9), ("NoMerge", 0.01, 0.99)):
        content = results(name, None if name == "NoMerge" else 4.0, 0, loss)
        content["metrics"]["quality/exact"] = exact
        write_run(tmp_path / name, content, curves=False)
    rows = put_together(read(tmp_path))
    assert {rows[i].method for i in best_rows(rows, column(QUALITY))} == {"ToMe"}
    assert {rows[i].method for i in best_rows(rows, column("quality/exact"))} == {"UniformPool"}
    assert best_rows(rows, column("ms_per_sample")) == set()


def test_cells_by_hand(tmp_path: Path) -> None:
    for seed, (loss, milliseconds) in enumerate(((0.1, 1.0), (0.2, 1.5))):
        content = results("QuickMerge", 4.0, seed, 0.1)
        content["metrics"] |= {
            "quality/nats": loss,
            "tokens/kept_mean": 16.2,
            "tokens/kept_p5": 8,
            "tokens/kept_p95": 27.5,
        }
        content["cost"] = {
            "ms_per_sample": milliseconds,
            "prior_flops_per_sample": 3.3e6,
            "peak_memory_bytes": 2**21,
        }
        write_run(tmp_path / str(seed), content, curves=False)
    (row,) = put_together(read(tmp_path))
    assert cell(row, column("quality/nats")) == "0.150 \u00b1 0.071"
    assert cell(row, column("quality/nats"), short=True) == "0.150"
    assert cell(row, column("tokens/kept_mean")) == "16.2 (8\u201327.5)"
    assert cell(row, column("ms_per_sample")) == "1.25 \u00b1 0.35"
    assert cell(row, column("prior_flops_per_sample")) == "3.30"
    assert cell(row, column("peak_memory_bytes")) == "2.00"
    assert cell(row, column("ms_merge")) == "-"
    assert column("ms_merge") not in shown([row])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.02314, "0.0231"), (1.254, "1.25"), (131.4, "131"), (2460.0, "2460"), (0.0, "0"), (math.nan, "-")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(25.0, "25"), (25.04, "25"), (27.46, "27.5"), (math.inf, "-")])
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


def test_pareto_front_by_hand() -> None:
    points = [(8, 0.3), (8, 0.2), (16, 0.2), (16, 0.1), (27, 0.15), (64, 0.1), (16, 0.1)]
    assert pareto_front(points) == [1, 3, 6]


def test_curves_skip_empty_cells_and_take_the_later_value(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss/target,val/quality/nats\n0,10,2.0,\n0,10,,1.5\n0,20,1.0,\n0,10,3.0,\n0,30,nan,\n0,4"
    )
    curves = read_curves(tmp_path, ("train/loss/target", "val/quality/nats", "absent"))
    assert curves == {"train/loss/target": [(10.0, 3.0), (20.0, 1.0)], "val/quality/nats": [(10.0, 1.5)]}
    assert read_curves(tmp_path / "nowhere", ("x",)) == {}


def test_parts_of_a_mixture_have_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,train/video/loss/target,train/text/loss/target,val/quality/nats\n1,3.0,,1\n2,,2.0,1\n"
    )
    assert read_curves(tmp_path / "video", ("train/loss/target", "val/quality/nats")) == {
        "train/loss/target": [(1.0, 3.0)]
    }


def test_one_run_alone_has_no_plot_of_one_point(tmp_path: Path) -> None:
    write_run(tmp_path / "a", results("QuickMerge", 4.0, 0, 0.1))
    write_report([tmp_path], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "image-curves.png", "image-kept.png", "image-time.png",
    ]  # fmt: skip


def test_mean_curve_uses_shared_steps() -> None:
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0), (3, 1.0)]]) == [(2, 5.0)]
    assert mean_curve([]) == []


def test_smoothing_keeps_the_mean() -> None:
    curve = [(float(i), float(i % 7)) for i in range(600)]
    smooth = smoothed(curve, points=60)
    assert len(smooth) == 60
    assert statistics.fmean(v for _, v in smooth) == pytest.approx(statistics.fmean(v for _, v in curve))


def test_pictures_of_the_same_sample_stand_side_by_side(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for merger in ("QuickMerge", "ToMe"):
        run = write_run(tmp_path / merger, results(merger, 4.0, 0, 0.2), curves=False)
        (run / "report" / "examples").mkdir(parents=True)
        for stage in ("val", "test"):
            for place in range(3):
                Figure(figsize=(1, 1)).savefig(
                    run / "report" / "examples" / f"{stage}-{place:02d}-key-{place}.png"
                )
    (section,) = write_report([tmp_path]).sections
    assert [sample["name"] for sample in section.pictures] == ["key-0", "key-1"]
    assert [[p["caption"] for p in block] for block in section.pictures[0]["blocks"]] == [
        ["QuickMerge 4x", "ToMe 4x"]
    ]


def test_text_from_runs_is_escaped(tmp_path: Path) -> None:
    content = results("ToMe", 4.0, 0, 0.2) | {"experiment": "<script>alert(1)</script> [red]"}
    write_run(tmp_path / "a", content, curves=False)
    report = write_report([tmp_path])
    assert "<script>" not in report.page.read_text()
    console = Console(record=True, file=(tmp_path / "log").open("w"))
    print_report(report, console)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN_DIR"),
        (["nowhere"], "nowhere is not a directory; expected"),
        (["."], "no results.json in . or below; expected a tested run"),
        ([".", "--outt", "x"], "--outt"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_unwritable_place_is_one_line(comparison: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another place with --out"):
        write_report([comparison], tmp_path / "file" / "report")


def test_default_place_of_one_run_and_of_several(tmp_path: Path) -> None:
    assert default_directory([tmp_path / "a"]) == tmp_path / "a" / "report"
    assert default_directory([tmp_path / "a" / "v1", tmp_path / "b" / "v1"]) == tmp_path / "report"


def test_help_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from qm_lightning.cli import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'lightning')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "RUN_DIR" in ran.stdout
