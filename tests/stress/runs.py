"""Training runs of the tiny dataset that can be killed in any way, and what has to be the same after they went on.

They are forked from a process that has imported everything, so that hundreds of them start in seconds.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY
from torchvision.models import resnet18

import train
from benchmarks import memory
from cli import run_script
from utils import load_checkpoint

SMALLEST = (
    *TINY,
    *("data.shard_rows=4", "train.epochs=4", "train.warmup_steps=2", "train.log_every=1", "train.checkpoint_every=1"),
)
BACKBONE = "encoder.weights=backbone.pth"  # see save_backbone
Script = Callable[[], int | None]


def start(run: str) -> list[str]:
    return [*SMALLEST, f"run={run}", f"data.cache=cache-{run}"]


def start_or_resume(run: str, *words: str) -> list[str]:
    return ["--resume", "--run", run] if Path("runs", run, "last.pth").is_file() else [*start(run), *words]


def save_backbone() -> None:
    """Write a backbone to the file that BACKBONE names, so that checkpoints do not hold it, and are small."""
    torch.save(resnet18().state_dict(), "backbone.pth")


def fork(script: Script, words: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> ForkProcess:
    """Run a script's `main` in a child, after `prepare()`; what it prints is added to `log`."""

    def child() -> None:
        sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
        sys.argv = ["script.py", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore Ctrl-C
        prepare()
        code = run_script(script)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script is over
        sys.stdout.flush()
        os._exit(code)

    process = get_context("fork").Process(target=child)
    process.start()
    return process


def wait(process: ForkProcess) -> int:
    """Return the exit code of a child, or the negative number of the signal that ended it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run(script: Script, *words: str, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run a script's `main` in a child; returns its exit code and what it printed."""
    log = Path("said.log")
    log.unlink(missing_ok=True)
    return wait(fork(script, list(words), log, prepare)), log.read_text()


def finish(run: str, *words: str) -> None:
    """Train to the end, from wherever the run is; `words` are further settings of a new one."""
    log = Path(f"{run}.log")
    if wait(fork(train.main, start_or_resume(run, *words), log)) != 0:
        raise RuntimeError(f"{run} did not end well: {log.read_text()[-2000:]}")


def wait_for(log: Path, text: str, seconds: float = 60) -> None:
    began = time.monotonic()
    while not log.is_file() or text not in log.read_text():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"{log} never said {text}: {log.read_text()[-2000:]}")
        time.sleep(0.02)


def refused(code: int, said: str) -> bool:
    """Whether a script ended as it should when it cannot go on: exit code 2, the reason last, no traceback."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return code == 2 and errors == said.splitlines()[-1:] and "Traceback" not in said


def differs(run: str, undisturbed: str = "whole") -> bool:
    """Whether file names, log or checkpoints differ in a single bit from the undisturbed run's; only its name may."""
    return not same(*(contents(Path("runs", name)) for name in (run, undisturbed)))


def contents(folder: Path) -> list[Any]:
    states = [load_checkpoint(folder / name) | {"config": 0} for name in ("last.pth", "checkpoints.pth")]
    return [sorted(path.name for path in folder.iterdir()), (folder / "loss_log.txt").read_bytes(), *states]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def own_memory_and_files(pid: int) -> np.ndarray:
    """Return the MB that a process has of its own, without the files that it maps, and how many files are open."""
    return np.array([memory.own_memory(pid)[0] * 1000, len(os.listdir(f"/proc/{pid}/fd"))])
