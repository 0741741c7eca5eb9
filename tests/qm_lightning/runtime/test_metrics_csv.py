"""metrics.csv goes on after a resume, without a step twice."""

from pathlib import Path

import pytest

from qm_lightning.runtime.csv_log import RunCSVLogger


def log(folder: Path, steps: range, start: int | None, name: str = "loss") -> list[str]:
    logger = RunCSVLogger(folder, start)
    for step in steps:
        logger.log_metrics({name: float(step)}, step)
    logger.save()
    return (folder / "metrics.csv").read_text().splitlines()


def test_a_resume_drops_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, range(6), None)
    lines = log(tmp_path, range(4, 8), 4)  # the checkpoint has 4 steps behind it: rows 0 to 3
    assert [line.split(",") for line in lines] == [["loss", "step"], *[[f"{i}.0", str(i)] for i in range(8)]]


def test_a_new_metric_gets_a_column(tmp_path: Path) -> None:
    log(tmp_path, range(2), None)
    lines = log(tmp_path, range(2, 3), 2, "accuracy")
    header = lines[0].split(",")
    assert set(header) == {"loss", "accuracy", "step"}
    assert len(lines) == 4


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, range(3), None)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3.0")
    assert len(log(tmp_path, range(3, 5), 3)) == 6


def test_a_full_disk_loses_no_row_that_fits_later(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = RunCSVLogger(small_disk)
    logger.log_metrics({"loss": 0.0}, 0)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2 << 20))
    for step in range(1, 400):
        logger.log_metrics({"loss": float(step)}, step)
    logger.log_metrics({"accuracy": 1.0}, 400)  # a new column: the whole file is written again
    assert capsys.readouterr().err.count("could not write") == 1
    filler.unlink()
    logger.save()
    lines = (small_disk / "metrics.csv").read_text().splitlines()
    assert lines[0] == "accuracy,loss,step"
    assert [line.split(",")[2] for line in lines[1:]] == [str(step) for step in range(401)]
    assert {path.name for path in small_disk.iterdir()} == {"metrics.csv"}
