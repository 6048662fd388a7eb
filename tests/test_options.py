"""The command line of the scripts: mistakes are answered at once, and what people type is understood."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from cli import options
from config import load_config

ROOT = Path(cli.__file__).parents[1]
Parsed = Callable[..., object]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`typed(options.train, "--epochs", "2")` returns what a script reads of these words."""

    def read(script: Callable, *words: str) -> object:
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return script()

    return read


@pytest.fixture
def runs(archive: Path) -> Path:
    """A working folder with pictures and two runs, of which only the files are there."""
    for name in ("first", "second"):
        Path("runs", name).mkdir(parents=True)
        for file in ("checkpoints.pth", "last.pth", "loss_log.txt"):
            Path("runs", name, file).touch()
    return archive.parent


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        *((f"{script}.py --help", 0, "usage:") for script in ("train", "evaluate", "calibrate", "visualize_loss")),
        ("inference_visualize.py --help", 0, "--num-captions"),
        ("train.py train.epoch=3", 2, "did you mean 'train.epochs'?"),
        ("train.py train.epochs=many", 2, "train.epochs = 'many'"),
        ("train.py --epochs 2", 2, "write train.epochs=2"),
        ("train.py --config nowhere", 2, "cannot read the config"),
        ("train.py data.root=nowhere", 2, "there is no folder nowhere"),
        ("train.py --resume --run nowhere", 2, "runs/nowhere holds no last.pth"),
        ("inference_visualize.py nowhere.jpg", 2, "there is no picture at nowhere.jpg"),
        ("inference_visualize.py --run nowhere", 2, "runs/nowhere holds no checkpoints.pth"),
        ("inference_visualize.py --checkpoint nowhere.pth", 2, "there is no checkpoint at nowhere.pth"),
        ("evaluate.py --run nowhere search.bean=3", 2, "did you mean 'search.beam'?"),
        ("evaluate.py nowhere", 2, "runs/nowhere holds no checkpoints.pth"),
        ("calibrate.py --run nowhere", 2, "runs/nowhere holds no checkpoints.pth"),
        ("visualize_loss.py nowhere", 2, "runs/nowhere holds no loss_log.txt"),
    ],
)
def test_help_and_mistakes_need_no_pytorch(line: str, status: int, told: str, tmp_path: Path) -> None:
    for slow in ("torch", "torchvision", "pandas", "matplotlib", "nltk"):
        (tmp_path / f"{slow}.py").write_text("raise SystemExit('imported')")
    script, *words = line.split()
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == status and told in (done.stdout + done.stderr).decode()
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == (status == 2)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("script", ["train", "evaluate", "inference_visualize"])
def test_ctrl_c_while_pytorch_is_loaded_ends_a_script_at_once(script: str, runs: Path) -> None:
    command = [sys.executable, str(ROOT / f"{script}.py")]
    process = subprocess.Popen(command, cwd=runs, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr and process.stderr.readline() == "loading PyTorch …\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT and process.stderr.read() == ""


def test_pictures_are_named_with_or_without_an_option(typed: Callable, runs: Path) -> None:
    for words in (["--images", "archive/images", "photo.jpg"], ["archive/images", "photo.jpg"]):
        shutil.copy("archive/images/00.jpg", "photo.jpg")
        args = typed(options.inference_visualize, *words, "search.beam=3")
        assert args.images == ["archive/images", "photo.jpg"] and args.overrides == ["search.beam=3"]
    args = typed(options.inference_visualize, "--attention", "photo.jpg", "--out", "here", "archive/images")
    assert (args.attention, args.out, sorted(args.images)) == (options.MEAN, "here", ["archive/images", "photo.jpg"])
    assert typed(options.inference_visualize, "photo.jpg", "--attention", "2").attention == "2"


def test_a_name_that_begins_with_a_dash_stands_behind_two(typed: Callable, runs: Path) -> None:
    shutil.copy("archive/images/00.jpg", "-n6.jpg")
    assert typed(options.inference_visualize, "--out", "here", "--", "-n6.jpg").images == ["-n6.jpg"]


def test_runs_are_named_with_or_without_an_option(typed: Callable, runs: Path) -> None:
    for words in (["--run", "first", "second"], ["first", "second"], ["first", "--run", "second"]):
        assert typed(options.visualize_loss, *words).run == ["first", "second"]
    for script in (options.evaluate, options.calibrate):
        assert typed(script, "runs/first").run == typed(script, "--run", "runs/first").run == "runs/first"
        assert typed(script, "runs/first/checkpoints.pth").checkpoint == ["runs/first/checkpoints.pth"]


def test_recipes_are_files_or_names_and_later_ones_win(typed: Callable, archive: Path) -> None:
    Path("mine.yaml").write_text("train: {epochs: 3}\nrun: mine")
    attention = ROOT / "configs/attention.yaml"
    for name in ("attention", "attention.yaml", "configs/attention.yaml", str(attention)):
        config, _ = options.choose_config(typed(options.train, "--config", name))
        assert config == load_config(attention)
    args = typed(options.train, "--config", "attention", "--config", "mine.yaml", "train.seed=5")
    config, _ = options.choose_config(args)
    assert (config.decoder.name, config.train.epochs, config.run, config.train.seed) == ("attention", 3, "mine", 5)


@pytest.mark.parametrize("line", ["train.epochs = 2", "train.epochs =2", "train.epochs= 2", "run=x train.epochs = 2"])
def test_blanks_around_the_equals_sign_are_forgiven(line: str, typed: Callable, archive: Path) -> None:
    assert "train.epochs=2" in typed(options.train, *line.split()).overrides


def test_a_word_that_is_nothing_is_refused(typed: Callable, archive: Path, refused: Callable) -> None:
    with refused("'attention' is neither an option nor a setting"):
        typed(options.train, "attention")
    with refused("one model too many"):
        typed(options.evaluate, "runs/a", "runs/b")


def test_a_tilde_is_the_home_folder_wherever_it_stands(
    typed: Callable, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(archive.parent))
    shutil.copytree(archive, archive.parent / "mine")
    config, _ = options.choose_config(typed(options.train, "data.root=~/mine", "data.cache=~/kept"))
    assert (config.data.root, config.data.cache) == (str(archive.parent / "mine"), str(archive.parent / "kept"))
    assert load_config(overrides=["data.root=[~/mine, other]"]).data.root == [str(archive.parent / "mine"), "other"]
    assert typed(options.inference_visualize, "mine/images", "--out=~/x").out == str(archive.parent / "x")


def test_nothing_is_written_to_the_root_of_the_file_system(
    typed: Callable, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.chdir("/")
    with refused("runs/ and cache/ are written to the current folder, which is /", f"cd {ROOT}"):
        typed(options.train)
