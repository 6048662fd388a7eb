"""A run's folder belongs to one training at a time, and a training that was killed leaves nothing in the way."""

import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from config import load_config
from training import runs
from training.runs import claimed, refuse_existing
from utils import RUNS

ROOT = Path(runs.__file__).parents[1]
HOLD = """
import pathlib, sys, training.runs
with training.runs.claimed(pathlib.Path("runs/a")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "PATIENCE", 0.1)


def test_a_second_training_is_told_who_is_there_until_that_one_is_dead(refused: Callable) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        with refused("runs", f"process {other.pid} on {socket.gethostname()}", "run=NAME"), claimed(Path("runs/a")):
            pass
        other.kill()
        other.wait()
    with claimed(Path("runs/a")):
        assert Path("runs/a/.holder").read_text().startswith(f"process {os.getpid()} ")


def test_a_training_that_cannot_begin_leaves_no_folder() -> None:
    with pytest.raises(ValueError, match="bad data"), claimed(Path("runs/a")):
        raise ValueError("bad data")
    assert not Path("runs").exists()


def test_what_killed_writes_left_is_swept_away_and_a_run_without_checkpoint_can_begin(refused: Callable) -> None:
    run = RUNS / "a"
    run.mkdir(parents=True)
    for name in (
        ".last.pth.x1y2z3",
        ".config.yaml.abc",
        "..holder.abc",
        ".notes.txt.swp",
        "config.yaml",
        "splits.json",
    ):
        (run / name).touch()
    config, args = load_config(overrides=["run=a"]), Namespace(resume=False, overwrite=False)
    with claimed(run):
        assert {path.name for path in run.iterdir()} == {
            ".holder",
            ".lock",
            ".notes.txt.swp",
            "config.yaml",
            "splits.json",
        }
        (run / ".notes.txt.swp").unlink()
        refuse_existing(run, args, config)
        (run / "last.pth").touch()
        with refused("exists already"):
            refuse_existing(run, args, config)
