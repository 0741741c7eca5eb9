"""``train.py generate`` in both modes, and its mistakes."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from text_runs import Work

from qm_lightning.cli import main
from qm_lightning.errors import UserError
from qm_lightning.export import save_pretrained
from qm_lightning.generation import Generation, Sampling
from qm_lightning.runtime.trained_run import TrainedRun, open_trained_run

FEW = ["--max_new_tokens", "4"]
PROMPTS = [b"import os\n", b"def main(argv):\n    return 0", b"x"]


@pytest.fixture(scope="module", params=["streaming", "conditioning"])
def run(request: pytest.FixtureRequest) -> TrainedRun:
    opened = open_trained_run(request.getfixturevalue(f"{request.param}_run"))
    # Far from uniform, so that greedy choices are no near-ties; fp64, so that padding adds up alike.
    torch.manual_seed(0)
    torch.nn.init.normal_(opened.module.prior.head.weight, std=1.0)
    opened.module.prior.double()
    return opened


def write(
    run: TrainedRun, texts: list[bytes], *stop: str, eos: int | None = None, **settings: object
) -> Generation:
    ids = [torch.tensor(list(text)) for text in texts]
    sampling = Sampling(**{"max_new_tokens": 6, **settings})  # type: ignore[arg-type]
    generation = Generation(run.module, ids, run.data.decode_targets, sampling, eos, stop)
    for _ in generation:
        pass
    return generation


def test_each_prompt_is_continued_as_if_it_were_alone(run: TrainedRun) -> None:
    together = [row.ids for row in write(run, PROMPTS, temperature=0.0).rows]
    assert together == [write(run, [text], temperature=0.0).rows[0].ids for text in PROMPTS]
    assert len({tuple(ids) for ids in together}) == 3


def test_the_seed_decides(run: TrainedRun) -> None:
    a, b, c = ([row.ids for row in write(run, PROMPTS, seed=seed).rows] for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_stop_texts_and_end_tokens_end_a_continuation(run: TrainedRun) -> None:
    free = write(run, PROMPTS[:1], temperature=0.0).rows[0]
    assert (len(free.ids), free.finished) == (6, "length")
    ended = write(run, PROMPTS[:1], temperature=0.0, eos=free.ids[3]).rows[0]
    assert ended.ids == free.ids[: free.ids.index(free.ids[3])]
    assert ended.finished == "end token"
    stop = run.data.decode_targets(torch.tensor(free.ids))[2:4]
    stopped = write(run, PROMPTS[:1], stop, temperature=0.0).rows[0]
    assert stopped.finished == "stop text"
    assert stopped.text == free.text[: free.text.index(stop)]


def test_the_cost_counts_tokens_and_cache(run: TrainedRun) -> None:
    generation = write(run, PROMPTS[:2], temperature=0.0)
    cost = generation.cost
    assert (cost.steps, cost.further) == (6, 10)
    stop = generation.rows[0].text[:1]
    ended = write(run, PROMPTS[:2], stop, temperature=0.0)
    assert len(ended.rows[0].ids) == 1
    assert ended.cost.further == len(ended.rows[1].ids) - 1  # a finished row writes nothing more
    assert 0 < cost.merged < cost.tokens
    assert 0 < cost.cache_bytes < cost.unmerged_cache_bytes
    prior = run.module.prior
    assert prior.trunk.cache_bytes(2, 7) == prior.trunk.new_cache(2, 7).nbytes


def test_what_may_still_change_is_not_shown(streaming_run: Path) -> None:
    run = open_trained_run(streaming_run)
    generation = Generation(
        run.module, [torch.tensor([65])], run.data.decode_targets, Sampling(8), None, ["\n\n", "END"]
    )
    row = generation.rows[0]
    for text, shown in (("ab\n", "ab"), ("abEN", "ab"), ("ab\ufffd", "ab"), ("abE\n", "abE"), ("abN", "abN")):
        row.text = text
        assert generation.settled(row) == shown
    row.finished = "length"
    assert generation.settled(row) == "abN"


@pytest.mark.parametrize("mode", ["streaming", "conditioning"])
def test_the_command(
    mode: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = str(request.getfixturevalue(f"{mode}_run"))
    file = tmp_path / "prompt.txt"
    file.write_bytes(PROMPTS[1])
    call = [
        "generate",
        directory,
        "--prompt",
        "import os",
        "--prompt-file",
        str(file),
        "--max-new-tokens",
        "5",
    ]
    capfd.readouterr()
    assert main([*call, "--seed", "7"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("--- prompt 1\n")
    assert "--- prompt 2\n" in out
    assert "over 2 prompt(s)" in err
    assert "Traceback" not in err
    assert main([*call, "--seed", "7"]) == 0
    assert capfd.readouterr().out == out


@pytest.mark.parametrize("mode", ["streaming", "conditioning"])
def test_an_export_writes_what_its_run_writes(
    mode: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = str(request.getfixturevalue(f"{mode}_run"))
    assert main(["export", directory, "--out", str(tmp_path / "m")]) == 0
    prompts = ["--prompt", "import os", "def f(x):", "--seed", "3", *FEW]
    capfd.readouterr()
    assert main(["generate", directory, *prompts]) == 0
    written = capfd.readouterr().out
    assert main(["generate", str(tmp_path / "m"), *prompts]) == 0
    out, err = capfd.readouterr()
    assert out == written
    assert "step 2, exported to" in err


def test_exports_that_cannot_write(
    streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(open_trained_run(streaming_run).module, tmp_path / "m")
    (tmp_path / "n").mkdir()
    (tmp_path / "n/config.json").write_text('{"format": 2, "prior": {}, "paths": {}}')
    for name, extra, expected in (
        ("m", [], "does not say how its text is read"),
        ("m", ["--ckpt_path", "last"], "is an export"),
        ("n", [], "no part of"),
    ):
        assert main(["generate", str(tmp_path / name), "--prompt", "a", *extra]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert expected in line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--prompt", ""], "prompt 1 is empty"),
        ([], "found no prompt"),
        (["--prompt", "a", "--temperature", "-0.5"], "temperature=-0.5; expected 0 (greedy)"),
        (["--prompt", "a", "--top_p", "0"], "top_p=0.0"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a" * 90, "--max_new_tokens", "8"], "90 tokens and 8 new ones; expected at most 96"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt", "a", "--ckpt_path", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--prompt", "a", "--backbone", "./nowhere"], "nowhere"),
        (["--prompt", "a", "--device", "teapot"], "--device teapot"),
        (
            ["--prompt", "a", "--seed", "9" * 20],
            "seed=99999999999999999999; expected a whole number of 64 bits",
        ),
        (["--prompt", "a\udcff"], "prompt 1 is not UTF-8 (invalid start byte at byte 1)"),
        (["--prompt", "a", "--modality", "text"], "has one part only; expected no --modality"),
        (["--prompt", "a", "--temprature", "1"], "--temprature"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str], expected: str, streaming_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(streaming_run), *extra]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line


def test_a_reader_that_has_enough_ends_the_writing(streaming_run: Path) -> None:
    command = "from qm_lightning.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    call = [sys.executable, "-c", command, "generate", str(streaming_run), "--prompt", "a", "--seed", "1"]
    with subprocess.Popen(
        [*call, "--max_new_tokens", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_ctrl_c_shows_what_was_written(
    streaming_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(generation: Generation) -> Iterator[object]:
        written = each(generation)
        yield from itertools.islice(written, 3)
        raise KeyboardInterrupt

    each = Generation.__iter__
    capsys.readouterr()
    call = ["generate", str(streaming_run), "--prompt", "import os", "x", "--temperature", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(Generation, "__iter__", interrupted)
        assert main([*call, "--max_new_tokens", "20"]) == 130
    out, err = capsys.readouterr()
    written = write(open_trained_run(streaming_run), [b"x"], temperature=0.0, max_new_tokens=3)
    assert out.partition("--- prompt 2\n")[2] == written.rows[0].text + "\n"
    assert "tokens/s over 2 prompt(s)" in err


def test_a_long_prompt_of_the_conditioning_mode_is_refused(
    conditioning_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(conditioning_run), "--prompt", "a" * 97]) == 2
    assert "97 tokens; expected at most 96 in all" in capsys.readouterr().err


def test_unknown_bytes_are_refused(
    streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("café".encode("latin-1"))
    assert main(["generate", str(streaming_run), "--prompt_file", str(file)]) == 2
    assert "prompt 1 is not UTF-8 (unexpected end of data at byte 3)" in capsys.readouterr().err


def test_runs_that_cannot_write(
    streaming_run: Path, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    shutil.copy(streaming_run / "config.yaml", tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    checkpoint = torch.load(streaming_run / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["prior.head.weight"].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    assert (
        main(["generate", str(tmp_path), "--prompt", "a", "--ckpt_path", str(tmp_path / "nan.ckpt"), *FEW])
        == 2
    )
    assert "logits are not finite" in capsys.readouterr().err
    del checkpoint["state_dict"]["prior.head.weight"]
    torch.save(checkpoint, tmp_path / "torn.ckpt")
    with pytest.raises(UserError, match="does not fit"):
        open_trained_run(tmp_path, str(tmp_path / "torn.ckpt"))
    (tmp_path / "config.yaml").write_text("model: {class_path: x, init_args: {}}")
    with pytest.raises(UserError, match="trains no merger"):
        open_trained_run(tmp_path)
