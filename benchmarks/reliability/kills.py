"""Kills training, resumes it, and compares what it leaves with what an undisturbed run left, bit for bit."""

import io
import os
import posix
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import train
from benchmarks.reliability.tiny import SMALLEST, fork, write_dataset
from utils import load_checkpoint

KILLS_PER_RUN = 10
ACTS = {"write", "flush", "fsync", "replace"}  # C functions of files
PLACES = {  # the innermost of these functions on the stack tells what was going on
    "write_log": "logging",
    "save_checkpoint": "saving",
    "start_run": "starting",
    "claimed": "locking",
    "fill": "extracting",
    "cut": "cutting words",
    "print": "printing",
}


@dataclass
class Result:
    """How often something was tried, how often something was lost by it, and what else was seen."""

    tried: int = 0
    lost: int = 0
    figures: str = ""


def kill_at_random(pid: int, rng: random.Random, longest: float) -> None:
    time.sleep(rng.uniform(0, longest))
    send(pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Signal a child of this process, which may have ended but is not reaped yet."""
    os.kill(pid, number)


def die_at(number: int, after: bool, told: Path) -> None:
    """Make this process kill itself at so many acts on files: before the act, or right after it."""
    left = number

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal left
        if event == ("c_return" if after else "c_call") and is_act(function):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                names = [each.name for each in reversed(traceback.extract_stack(frame))]
                place = next((PLACES[name] for name in names if name in PLACES), "printing")
                with open(told, "a") as file:
                    file.write(f"{place}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def is_act(function: Any) -> bool:
    """Whether a C function writes to a file, flushes or renames one; not to a buffer in memory."""
    own = getattr(function, "__self__", None)
    of_file = isinstance(own, (io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper, io.FileIO)) or own is posix
    return getattr(function, "__name__", "") in ACTS and of_file


def words_of(run: str) -> list[str]:
    if Path("runs", run, "last.pth").is_file():
        return ["--resume", "--run", run]
    return [*SMALLEST, f"run={run}", f"data.cache=cache-{run}"]


def finish(run: str) -> None:
    """Let the run go on to its end."""
    pid = fork(train.main, words_of(run), Path(f"{run}.log"), lambda: None)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise RuntimeError(f"{run} did not end well: {Path(f'{run}.log').read_text()[-2000:]}")


def differs(run: str, other: str) -> bool:
    """Whether the runs' logs, weights, averages, optimisers or names of files differ."""
    one, two = (Path("runs", name) for name in (run, other))
    if {path.name for path in one.iterdir()} != {path.name for path in two.iterdir()}:
        return True
    if (one / "loss_log.txt").read_bytes() != (two / "loss_log.txt").read_bytes():
        return True
    for file in ("last.pth", "checkpoints.pth"):
        first, second = (load_checkpoint(path / file) for path in (one, two))
        for state in (first, second):
            del state["config"]  # which holds the run's name
        if not same(first, second):
            return True
    return False


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def disturb(kills: int, strike: Callable[[str, int], int | None]) -> Result:
    """Train runs, `strike` each up to ten times and let it end; `strike` returns the exit code, or None for a kill.

    A run that ends before is begun anew under another name, so that there are `kills` in the end.
    """
    result = Result()
    number = 0
    while result.tried < kills:
        number += 1
        run, struck = f"run{number}", 0
        while struck < KILLS_PER_RUN and result.tried < kills:
            if strike(run, result.tried) is not None:
                break
            struck += 1
            result.tried += 1
        finish(run)
        result.lost += differs(run, "whole")
        result.figures = f"{number} runs compared bit for bit"
        print(f"{result.tried} of {kills} interruptions in {number} runs, {result.lost} runs differ", flush=True)
    return result


def outcome(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sigkill_at_random(run: str, number: int, seconds: float) -> int | None:
    rng = random.Random(number)
    pid = fork(train.main, words_of(run), Path(f"{run}.log"), lambda: None)
    kill_at_random(pid, rng, seconds)
    code = outcome(pid)
    return None if code == -signal.SIGKILL else code


def sigkill_at_act(run: str, number: int, acts: int) -> int | None:
    rng = random.Random(number)
    prepare = partial(die_at, rng.randint(1, acts), rng.random() < 0.5, Path("places"))
    code = outcome(fork(train.main, words_of(run), Path(f"{run}.log"), prepare))
    return None if code == -signal.SIGKILL else code


def asked_to_stop(run: str, number: int, seconds: float, sign: signal.Signals) -> int | None:
    """Signal the run at a random moment; it has to have saved every step that it logged, unless it had not begun."""
    log = Path(f"{run}.log")
    rng = random.Random(number)
    pid = fork(train.main, words_of(run), log, lambda: None)
    time.sleep(rng.uniform(0, seconds))
    send(pid, sign)
    code = outcome(pid)
    if code not in (130, -signal.SIGTERM):
        if code != 0 or "Traceback" in log.read_text():
            raise RuntimeError(f"{run} ended with {code}: {log.read_text()[-2000:]}")
        return code
    text = log.read_text()
    steps = re.findall(r"Epoch \[(\d+)/\d+\] Step \[(\d+)/(\d+)\]", text)
    if steps and "stopped; go on" in text.rpartition("data: ")[2]:
        epoch, batch, batches = map(int, steps[-1])
        saved = load_checkpoint(f"runs/{run}/last.pth")["progress"]["step"]
        if saved < (epoch - 1) * batches + batch:
            raise RuntimeError(f"{run} was asked to stop and did not save: {saved}, {steps[-1]}")
    return None


def in_folder(check: Callable[[], Result]) -> Result:
    """Run a check in a temporary folder with the dataset and an undisturbed run in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            write_dataset(Path("archive"))
            finish("whole")
            return check()
        finally:
            os.chdir(before)


def random_kills(kills: int = 100) -> Result:
    return in_folder(lambda: disturb(kills, partial(sigkill_at_random, seconds=one_run())))


def kills_at_acts(kills: int = 100) -> Result:
    def check() -> Result:
        result = disturb(kills, partial(sigkill_at_act, acts=count_acts()))
        places = Counter(Path("places").read_text().split("\n")[:-1])
        result.figures += "; while " + ", ".join(f"{place} {count}" for place, count in places.most_common())
        return result

    return in_folder(check)


def stops(sign: signal.Signals, number: int = 50) -> Result:
    return in_folder(lambda: disturb(number, partial(asked_to_stop, seconds=one_run(), sign=sign)))


def one_run() -> float:
    """Return the seconds that a run takes for its start and an epoch or so."""
    began = time.monotonic()
    finish("timed")
    return (time.monotonic() - began) * 0.4


def count_acts() -> int:
    """Return how many acts on files a run makes: a fifth, so that most runs are killed ten times."""

    def prepare() -> None:
        counted = 0

        def watch(frame: FrameType, event: str, function: Any) -> None:
            nonlocal counted
            if event == "c_call" and is_act(function):
                counted += 1
                if function.__name__ == "fsync":
                    Path("acts").write_text(str(counted))

        sys.setprofile(watch)

    outcome(fork(train.main, words_of("counted"), Path("counted.log"), prepare))
    return int(Path("acts").read_text()) // 5
