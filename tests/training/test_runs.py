"""A run's folder belongs to one training at a time, and a training that was killed leaves nothing in the way."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import train
from training import runs

ROOT = Path(train.__file__).parent
HOLD = """
import pathlib, sys, training.runs
with training.runs.locked(pathlib.Path("runs/a")):
    print("held", flush=True)
    sys.stdin.read()
"""
WORDS = (*TINY, "run=a", "train.epochs=1")


def test_a_second_training_is_refused_until_the_first_is_dead(
    archive: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        assert call(train.main, *WORDS) == 2
        holder = f"process {other.pid} on {socket.gethostname()}"
        assert f"runs/a is being trained by {holder}; wait for its end, stop it, or train another: run=NAME" in (
            capsys.readouterr().err.replace("\\", "/")
        )
        other.kill()
        other.wait()
    assert call(train.main, *WORDS) == 0


def test_what_a_training_left_that_was_killed_before_its_first_checkpoint_is_swept_away(
    archive: Path, call: Callable[..., int]
) -> None:
    run = Path("runs/a")
    run.mkdir(parents=True)
    for name in (".last.pth.x1y2z3", ".config.yaml.abc", "..holder.abc", "config.yaml", "splits.json", ".lock"):
        (run / name).touch()
    assert call(train.main, *WORDS) == 0
    written = {"config.yaml", "splits.json", "checkpoints.pth", "last.pth", "loss_log.txt"}
    assert {path.name for path in run.iterdir()} == {".lock", *written}
