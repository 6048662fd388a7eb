"""The command line of every script, and how scripts end: a mistake in one sentence with exit code 2, no traceback."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import cli
from cli import Parser, UserError, run_script
from config import setting_names

ROOT = Path(cli.__file__).parents[1]
FULL_MEMORY = "memory is full, a GPU's where one is used; lower train.batch_size, encoder.image_size or search.beam"


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("there is no dog; bring one"), "there is no dog; bring one"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "dogs.csv"),
            "dogs.csv: No such file or directory; check the path, its permissions and the disk",
        ),
        (OSError("odd"), "a file: odd; check the path, its permissions and the disk"),
        (  # file names could rewrite what a terminal shows
            UserError("there is no \x1b]0;title\x07 \u202efile\n of that name; check it"),
            r"there is no \x1b]0;title\x07 \u202efile\n of that name; check it",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), FULL_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), FULL_MEMORY),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(partial(fail, error)) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run_script(lambda: None), run_script(lambda: 7)] == [0, 7]
    with pytest.raises(RuntimeError):  # a fault of the program keeps its traceback
        run_script(partial(fail, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert capsys.readouterr().err == ""
    for interrupt in (KeyboardInterrupt(), KeyboardInterrupt("half is done")):
        assert run_script(partial(fail, interrupt)) == 130
    assert capsys.readouterr().err == "interrupted\ninterrupted; half is done\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_reader_of_the_output_may_leave_early() -> None:
    script = "import sys, cli; sys.exit(cli.run_script(lambda: [print(n) for n in range(99_999)] and None))"
    line = f'("{sys.executable}" -c "{script}"; echo $? >&2) | head -n 1'
    assert subprocess.run(line, shell=True, cwd=ROOT, capture_output=True).stderr == b"141\n"


def test_characters_that_no_encoding_has_are_printed_escaped() -> None:
    script = "import cli, sys; sys.exit(cli.run_script(lambda: print('caf\\udce9.jpg')))"
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).stdout
    assert printed.strip() == rb"caf\udce9.jpg"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_is_told_where_pytorch_answers_it_with_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    assert run_script(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    script = "import cli, os, signal; os.kill(os.getpid(), signal.SIGINT); import torch"
    stopped = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (-signal.SIGINT, "interrupted\n")


def parse() -> None:
    parser = Parser()
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--resume", action="store_true")
    parser.parse_options(setting_names())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--epochs 3", "there is no --epochs; write train.epochs=3"),
        ("run=mine --batch-size=32 --resume", "there is no --batch-size; write train.batch_size=32"),
        ("--frozen --resume", "there is no --frozen; write encoder.frozen=…"),
        ("--name x", "there is no --name; write encoder.name=x or decoder.name=x"),
        ("--fast", "there is no --fast; there are --config, --resume, and settings such as train.epochs=3"),
        ("-e 3", "there is no -e; there are --config, --resume, and settings such as train.epochs=3"),
    ],
)
def test_an_unknown_option_is_refused_with_the_setting_that_was_meant(
    line: str, sentence: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(parse, *line.split()) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_settings_may_stand_anywhere_and_a_value_may_look_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser()
    parser.add_argument("--images", nargs="+")
    parser.add_argument("--out")
    line = "train.lr=1 --images a b search.beam=5 --out beam=5 run=mine"
    monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
    args = parser.parse_options(setting_names())
    assert (args.images, args.out) == (["a", "b"], "beam=5")
    assert args.overrides == ["train.lr=1", "search.beam=5", "run=mine"]
