"""What a disk, a user or a second process can do to a training run: each must end in one sentence and spare the run."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import evaluate
import inference_visualize
import train
from benchmarks.reliability.kills import Result, differs, finish, in_folder, outcome, same, words_of
from benchmarks.reliability.tiny import SMALLEST, fork
from utils import load_checkpoint

NOBODY = 65534
FORBIDDEN = (
    *("runs", "runs/whole", "runs/whole/last.pth", "runs/whole/checkpoints.pth", "runs/whole/splits.json"),
    *("archive", "archive/captions.csv", "archive/images", "archive/images/00.jpg", "cache-whole"),
)
ROOT = Path(__file__).parents[2]
Script = Callable[[], int | None]


def nothing() -> None:
    pass


def run(script: Script, *words: str, prepare: Callable[[], None] = nothing) -> tuple[int, str]:
    """Run a script's main in a child; returns its exit code and what it printed."""
    log = Path("said.log")
    log.unlink(missing_ok=True)
    log.touch()
    log.chmod(0o666)
    return outcome(fork(script, list(words), log, prepare)), log.read_text()


def refused(code: int, said: str) -> bool:
    """Whether a script ended as it has to where it cannot go on: code 2, a last line with the reason, no traceback."""
    lines = said.splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    return code == 2 and told == lines[-1:] and "Traceback" not in said


def note(result: Result, fine: bool, what: str, said: str = "") -> None:
    result.tried += 1
    if not fine:
        result.lost += 1
        print(f"LOST {what}: {said[-1500:]}", flush=True)


def start(name: str) -> list[str]:
    return [*SMALLEST, f"run={name}", f"data.cache=cache-{name}"]


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def resize(place: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a memory disk of this size at `place`; gives the function that changes the size. Needs root on Linux."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield partial(resize, place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk() -> Result:
    """Train on disks that are full sooner or later: at the first file, inside a checkpoint, between two of them."""

    def check() -> Result:
        result = Result()
        size = Path("runs/whole/last.pth").stat().st_size
        for number, share in enumerate([0.0001, 0.3, 0.9, 1.02, 1.5, 1.99, 2.02, 2.5, 2.9, 2.99]):
            name = f"full{number}"
            with small_disk(Path("runs", name), f"{max(1, int(share * size) // 1024)}k") as grow_to:
                code, said = run(train.main, *start(name))
                fine = refused(code, said) and "No space left" in said
                last = Path("runs", name, "last.pth")
                if last.exists():
                    load_checkpoint(last)
                grow_to("1g")
                finish(name)
                note(result, fine and not differs(name, "whole"), f"a disk of {share} checkpoints", said)
        for number, share in enumerate([0.0001, 0.5, 0.9]):
            name = f"encoded{number}"
            with small_disk(Path(f"cache-{name}"), f"{max(8, int(share * 40))}k") as grow_to:
                code, said = run(train.main, *start(name))
                grow_to("1g")
                finish(name)
                note(result, refused(code, said) and not differs(name, "whole"), f"a cache of {share}", said)
        return result

    return in_folder(check)


# ---- permissions -----------------------------------------------------------------------------------------------------


def drop_privileges() -> None:
    """Make root, who may do anything, a user like all others: files of others are closed to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def no_permission() -> Result:
    """Run every script as a user who may not write, or read, one thing after another."""

    def check() -> Result:
        result = Result()
        scripts: list[tuple[Script, list[str]]] = [
            (train.main, ["--resume", "--run", "whole"]),
            (evaluate.main, ["--run", "whole", "--tokeniser", "words"]),
            (inference_visualize.main, ["--run", "whole"]),
            (train.main, start("new")),
        ]
        before = load_checkpoint("runs/whole/last.pth")
        for path in map(Path, FORBIDDEN):
            for mode in (0o000, 0o555 if path.is_dir() else 0o444):
                usual = path.stat()
                os.chown(path, NOBODY, NOBODY)
                path.chmod(mode)
                for script, words in scripts:
                    code, said = run(script, *words, prepare=drop_privileges)
                    note(result, code == 0 or refused(code, said), f"{path} {mode:o} {words}", said)
                os.chown(path, usual.st_uid, usual.st_gid)
                path.chmod(usual.st_mode)
        note(result, same(load_checkpoint("runs/whole/last.pth"), before), "the checkpoint")
        return result

    return in_folder(check)


def read_only() -> Result:
    """Run every script where runs/ and cache/ are mounted read-only."""

    def check() -> Result:
        result = Result()
        shutil.move("runs/whole", "kept")
        with small_disk(Path("runs"), "1g"):
            shutil.copytree("kept", "runs/whole")
            subprocess.run(["mount", "-o", "remount,ro", "runs"], check=True)
            for script, words in (
                (train.main, start("new")),
                (train.main, ["--resume", "--run", "whole"]),
                (train.main, [*start("whole"), "--overwrite"]),
                (evaluate.main, ["--run", "whole", "--tokeniser", "words"]),
                (inference_visualize.main, ["--run", "whole"]),
            ):
                code, said = run(script, *words)
                note(result, refused(code, said) and "Read-only" in said, f"read-only {words}", said)
        return result

    return in_folder(check)


# ---- files that vanish, and a clock that goes backwards --------------------------------------------------------------


def vanishing() -> Result:
    """Delete one thing after another while training is under way, and between two runs."""

    def check() -> Result:
        result = Result()
        pixels = ["encoder.frozen=false", "train.num_workers=2"]
        for number, (path, words) in enumerate(
            [
                ("runs/{}/last.pth", []),
                ("runs/{}/checkpoints.pth", []),
                ("runs/{}/loss_log.txt", []),
                ("runs/{}", []),
                ("runs/{}/.lock", []),
                ("cache-{}", []),
                ("archive/images/00.jpg", []),
                ("archive/captions.csv", []),
                ("archive/images/00.jpg", pixels),
                ("archive/images", pixels),
            ]
        ):
            name = f"gone{number}"
            shutil.rmtree("archive")
            shutil.copytree("kept", "archive")
            log = Path(f"{name}.log")
            pid = fork(train.main, [*start(name), *words, "train.epochs=200"], log, nothing)
            wait_for(log, "Epoch [2/")
            gone = Path(path.format(name))
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
            time.sleep(1)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, signal.SIGINT)
                status = os.waitpid(pid, 0)[1]
            code, said = os.waitstatus_to_exitcode(status), log.read_text()
            fine = refused(code, said) or (code == 130 and "Traceback" not in said)
            note(result, fine, f"{path} vanished", said)
        return result

    def with_copy() -> Result:
        shutil.copytree("archive", "kept")
        return check()

    return in_folder(with_copy)


def wait_for(log: Path, text: str, seconds: float = 60) -> None:
    began = time.monotonic()
    while not log.is_file() or text not in log.read_text():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"{log} never said {text}: {log.read_text()[-2000:]}")
        time.sleep(0.02)


def clock_backwards() -> Result:
    """Kill a run, set the clock back by days, and go on; needs the program faketime."""

    def check() -> Result:
        result = Result()
        for number, when in enumerate(["-1h", "-3d", "-9000d"]):
            name = f"back{number}"
            pid = fork(train.main, start(name), Path(f"{name}.log"), nothing)
            wait_for(Path(f"{name}.log"), "Epoch [2/")
            os.kill(pid, signal.SIGKILL)
            outcome(pid)
            command = ["faketime", "-f", when, sys.executable, str(ROOT / "train.py"), *words_of(name)]
            ended = subprocess.run(command, capture_output=True, text=True)
            note(result, ended.returncode == 0 and not differs(name, "whole"), when, ended.stderr)
        return result

    return in_folder(check)


# ---- two at once -----------------------------------------------------------------------------------------------------


def two_at_once() -> Result:
    """Start a second training in a run's folder while one is under way, and another after that one was killed."""

    def check() -> Result:
        result = Result()
        for number, words in enumerate([[], ["encoder.frozen=false", "train.num_workers=2"]]):
            name = f"two{number}"
            log = Path(f"{name}.log")
            pid = fork(train.main, [*start(name), *words, "train.epochs=300"], log, nothing)
            wait_for(log, "Epoch [2/")
            for second in (["--resume", "--run", name], [*start(name), *words, "--overwrite"], [*start(name), *words]):
                code, said = run(train.main, *second)
                fine = refused(code, said) and f"process {pid} on {os.uname().nodename}" in said
                note(result, fine, f"a second one {second}", said)
            os.kill(pid, signal.SIGKILL)
            outcome(pid)
            again = fork(train.main, ["--resume", "--run", name], Path(f"{name}-again.log"), nothing)
            wait_for(Path(f"{name}-again.log"), "going on with")
            os.kill(again, signal.SIGTERM)
            note(
                result,
                outcome(again) in (130, -signal.SIGTERM),
                "after the first was killed",
                Path(f"{name}-again.log").read_text(),
            )
        return result

    return in_folder(check)
