"""Kill or stop training, resume it, and compare what it leaves with an undisturbed run, bit for bit."""

import io
import os
import posix
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import train
from stress.conftest import Tally
from stress.runs import differs, finish, fork, start_or_resume, wait
from utils import load_checkpoint

SIGNALS = {"SIGKILL": 100, "SIGTERM": 50, "SIGINT": 50}  # how often each is sent
KILLS_PER_RUN = 10
FIRST_ACTS = 120  # about a fifth of those of a run, so that most runs are killed ten times
SELDOM = ["train.checkpoint_every=1000"]  # so that what a request to stop saves is not saved before
ACTS = {"write", "flush", "fsync", "replace"}  # C functions of files
pytestmark = pytest.mark.usefixtures("whole")


@pytest.mark.parametrize("name", SIGNALS)
def test_signals(tally: Tally, name: str) -> None:
    """a signal at a random moment, then --resume"""
    began = time.monotonic()
    finish("timed")
    longest = (time.monotonic() - began) * 0.4  # seconds until a run is in its second epoch or so
    disturb(tally, SIGNALS[name], partial(signal_at_random, sign=signal.Signals[name], longest=longest))


def test_kills_at_acts(tally: Tally) -> None:
    """SIGKILL before or after the Nth write, flush, fsync or rename, then --resume"""
    disturb(tally, 100, kill_at_act)


def disturb(tally: Tally, number: int, strike: Callable[[str, random.Random], bool]) -> None:
    """Strike training runs up to ten times each, then let them end and compare them with the undisturbed run.

    `strike` starts or resumes a run and returns False when the run ended before it was struck.
    """
    runs, number = 0, 12 if tally.short else number
    while tally.tried < number:
        runs += 1
        run, struck = f"run{runs}", 0
        while struck < KILLS_PER_RUN and tally.tried < number and strike(run, random.Random(tally.tried)):
            struck += 1
            tally.tried += 1
        finish(run)
        tally.lost += differs(run)
    tally.figures = f"{runs} runs compared bit for bit"


def signal_at_random(run: str, rng: random.Random, sign: signal.Signals, longest: float) -> bool:
    """Signal the run at a random moment; if it is asked to stop, it has to have saved every step that it logged."""
    log, polite = Path(f"{run}.log"), sign != signal.SIGKILL
    before = log.stat().st_size if log.exists() else 0
    process = fork(train.main, start_or_resume(run, *(SELDOM if polite else ())), log)
    time.sleep(rng.uniform(0, longest))
    assert process.pid
    os.kill(process.pid, sign)  # it is not reaped yet, so nobody else has its number
    code, text = wait(process), log.read_text()[before:]
    if code not in (0, 130, -signal.SIGKILL, -signal.SIGTERM) or "Traceback" in text:
        raise RuntimeError(f"{run} ended with {code}: {text[-2000:]}")
    steps = re.findall(r"Epoch \[(\d+)/\d+\] Step \[(\d+)/(\d+)\]", text)
    if polite and steps and "best epoch" not in text:
        epoch, batch, batches = map(int, steps[-1])
        saved = load_checkpoint(f"runs/{run}/last.pth")["progress"]["step"]
        if code != 130 or saved < (epoch - 1) * batches + batch:
            raise RuntimeError(f"{run} was asked to stop, ended with {code} and saved step {saved}, not {steps[-1]}")
    return code != 0


def kill_at_act(run: str, rng: random.Random) -> bool:
    """Let the run kill itself before, or right after, one of its first acts on files."""
    left, event_of_act = rng.randint(1, FIRST_ACTS), rng.choice(["c_call", "c_return"])

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal left
        left -= event == event_of_act and is_act(function)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork(train.main, start_or_resume(run), Path(f"{run}.log"), partial(sys.setprofile, watch))
    return wait(process) == -signal.SIGKILL


def is_act(function: Any) -> bool:
    """Whether a C function writes, flushes or renames a file; a buffer in memory is none."""
    own = getattr(function, "__self__", None)
    of_file = isinstance(own, (io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper, io.FileIO)) or own is posix
    return getattr(function, "__name__", "") in ACTS and of_file
