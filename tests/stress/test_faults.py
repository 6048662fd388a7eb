"""What a disk, a user, the clock, a second process or time can do to a run: it ends in one sentence, unharmed."""

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import evaluate
import inference_visualize
import train
import visualize_loss
from captioning import Captioner
from models.checkpoint import load_model
from stress import runs
from stress.conftest import Tally
from stress.runs import SMALLEST, Script, run, start
from utils import load_checkpoint

NOBODY = 65534
ROOT = Path(train.__file__).parent
RESUME: tuple[Script, list[str]] = (train.main, ["--resume", "--run", "whole"])
READERS: list[tuple[Script, list[str]]] = [
    (evaluate.main, ["--run", "whole", "--tokeniser", "words"]),
    (inference_visualize.main, ["--run", "whole"]),
]
PIXELS = ["encoder.frozen=false", "train.num_workers=2"]
GROWN = 20  # MB between the first tenth of a long run and its end, at most
pytestmark = pytest.mark.usefixtures("whole")


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mount a memory disk of this size at `folder`; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def test_full_disk(tally: Tally, whole: Path) -> None:
    """a disk that is full in the middle of training"""
    size = (whole / "last.pth").stat().st_size / 1024
    shares = [0.0001, 0.3, 0.9, 1.02, 1.5, 1.99, 2.02, 2.5, 2.9, 2.99]  # in the first file, in a later one, between two
    disks = [(f"full{number}", "runs/{}", max(1, int(share * size))) for number, share in enumerate(shares)]
    disks += [(f"encoded{number}", "cache-{}", kilobytes) for number, kilobytes in enumerate([8, 20, 36])]
    for name, place, kilobytes in disks[:: 6 if tally.short else 1]:
        with small_disk(Path(place.format(name)), kilobytes):
            code, said = run(train.main, *start(name))
            last = Path("runs", name, "last.pth")
            if last.exists():
                load_checkpoint(last)
            remount(Path(place.format(name)), "size=1g")
            runs.finish(name)
            fine = runs.refused(code, said) and "No space left" in said and not runs.differs(name)
            tally(fine, f"{place} on a disk of {kilobytes} kB", said)


def drop_privileges() -> None:
    """Make root a user like all others: files of other users are closed to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def test_no_permission(tally: Tally, whole: Path) -> None:
    """files and folders without permission"""
    before = load_checkpoint(whole / "last.pth")
    paths = [Path("runs"), whole, *(whole / name for name in ("last.pth", "checkpoints.pth", "splits.json"))]
    paths += map(Path, ["archive", "archive/captions.csv", "archive/images", "archive/images/00.jpg", "cache-whole"])
    for path in paths[:: 4 if tally.short else 1]:
        for mode in (0o000, 0o555 if path.is_dir() else 0o444):
            usual = path.stat()
            os.chown(path, NOBODY, NOBODY)
            path.chmod(mode)
            for script, words in (RESUME, *READERS, (train.main, start("new"))):
                code, said = run(script, *words, prepare=drop_privileges)
                tally(code == 0 or runs.refused(code, said), f"{path} {mode:o} {words}", said)
            os.chown(path, usual.st_uid, usual.st_gid)
            path.chmod(usual.st_mode)
    tally(runs.same(load_checkpoint(whole / "last.pth"), before), "the checkpoint")


def test_vanishing(tally: Tally) -> None:
    """files that vanish during training"""
    shutil.copytree("archive", "kept")
    own = [f"runs/{{}}{file}" for file in ("/last.pth", "/checkpoints.pth", "/loss_log.txt", "", "/.lock")]
    cases = [(path, list[str]()) for path in (*own, "cache-{}", "archive/images/00.jpg", "archive/captions.csv")]
    cases += [("archive/images/00.jpg", PIXELS), ("archive/images", PIXELS)]
    for number, (path, words) in enumerate(cases[:: 4 if tally.short else 1]):
        name = f"gone{number}"
        shutil.rmtree("archive")
        shutil.copytree("kept", "archive")
        log = Path(f"{name}.log")
        process = runs.fork(train.main, [*start(name), *words, "train.epochs=200"], log)
        runs.wait_for(log, "Epoch [2/")
        gone = Path(path.format(name))
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        process.join(60 if words == PIXELS else 1)  # pixels are read again in each epoch; the others may not be missed
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
        code, said = runs.wait(process), log.read_text()
        stopped = words != PIXELS and code == 130 and "Traceback" not in said
        tally(stopped or runs.refused(code, said), f"{path} vanished", said)


def test_two_at_once(tally: Tally) -> None:
    """two trainings in one run's folder"""
    for number, words in enumerate([[], PIXELS]):
        name = f"two{number}"
        log, again = Path(f"{name}.log"), Path(f"{name}-again.log")
        process = runs.fork(train.main, [*start(name), *words, "train.epochs=300"], log)
        runs.wait_for(log, "Epoch [2/")
        for second in (["--resume", "--run", name], [*start(name), *words, "--overwrite"], [*start(name), *words]):
            other = runs.fork(train.main, second, Path("other.log"))
            other.join(60)
            other.kill()  # where nothing refuses it
            code, said = runs.wait(other), Path("other.log").read_text()
            Path("other.log").unlink()
            named = str(process.pid) in said and os.uname().nodename in said
            tally(runs.refused(code, said) and named, f"a second one {second}", said)
        process.kill()
        process.join()
        process = runs.fork(train.main, ["--resume", "--run", name], again)
        runs.wait_for(again, "resuming")
        process.terminate()
        tally(runs.wait(process) in (130, -signal.SIGTERM), "after the first was killed", again.read_text())


def test_many_epochs(tally: Tally) -> None:
    """2,000 epochs"""
    epochs, log = 50 if tally.short else 2000, Path("long.log")
    words = [*SMALLEST, "run=long", f"train.epochs={epochs}", "train.checkpoint_every=1000", "train.log_every=1000"]
    process = runs.fork(train.main, words, log)
    assert process.pid
    runs.wait_for(log, f"Epoch [{epochs // 10}/", 3600)
    before = runs.own_memory_and_files(process.pid)
    runs.wait_for(log, f"Epoch [{epochs - 1}/", 3600 * 3)
    memory, files = runs.own_memory_and_files(process.pid) - before
    tally(runs.wait(process) == 0, "the run", log.read_text())
    tally(memory < GROWN, f"memory grew by {memory:.0f} MB")
    tally(files == 0, f"{files:.0f} more open files")
    began = time.monotonic()
    code, said = run(visualize_loss.main, "--run", "long")
    took = time.monotonic() - began
    tally(code == 0 and took < 5, f"the curve took {took:.1f} s", said)
    tally.figures = f"{epochs:,} epochs: {memory:+.1f} MB, {files:+.0f} open files, loss curve drawn in {took:.1f} s"


def test_many_captions(tally: Tally, whole: Path) -> None:
    """100,000 captions"""
    captions = 5_000 if tally.short else 100_000
    model = load_model(whole / "checkpoints.pth")
    pictures: list[str | Path] = [f"archive/images/{number % 12:02}.jpg" for number in range(captions // 10)]
    measured = []
    for _ in range(10):
        Captioner(model).caption(pictures)
        measured.append(runs.own_memory_and_files(os.getpid()))
    memory, files = np.min(measured[5:], axis=0) - measured[0]  # what is freed may be given back late
    tally(memory < GROWN, f"memory grew by {memory:.0f} MB")
    tally(files == 0, f"{files:.0f} more open files")
    tally.figures = f"{captions:,} captions: {memory:+.1f} MB, {files:+.0f} open files"


def test_poisoned(tally: Tally) -> None:
    """learning rates at which the loss explodes"""
    reason = r"the loss became NaN or infinite in step \d+ of runs/\S+ on 0\d.jpg, .* of step \d+:|numbers overflow"
    rates = ["3e38", "1e30", "1e20", "1e12"][: 1 if tally.short else 4]
    for rate, kind, every in itertools.product(rates, ("lstm", "attention", "transformer"), (1, 1000)):
        name = f"poisoned-{rate}-{kind}-{every}"
        words = [f"run={name}", f"train.lr={rate}", f"decoder.name={kind}", "train.clip_norm=1e30"]
        words += [f"train.log_every={every}", f"train.checkpoint_every={every}"]
        code, said = run(train.main, *SMALLEST, *words)
        states = [load_checkpoint(path) for path in Path("runs", name).glob("*.pth")]
        finite = all(bool(each.isfinite().all()) for state in states for each in state["decoder"].values())
        fine = finite and (code == 0 or (runs.refused(code, said) and re.search(reason, said) is not None))
        tally(fine, f"{kind} at {rate}, checked every {every} steps", said)


BLOCKED = """
import runpy, sys

def block(event, words):
    network = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if network or event == "socket.connect" and isinstance(words[1], tuple):
        print(f"BLOCKED {event} {words[1:]}", file=sys.stderr, flush=True)
        raise PermissionError("sockets are blocked")

sys.addaudithook(block)
sys.argv.pop(0)
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = (
    ("train.py", *SMALLEST, "run=offline"),
    ("train.py", *SMALLEST, "run=pixels", "encoder.frozen=false", "train.num_workers=1", "train.epochs=1"),
    ("train.py", "--config", str(ROOT / "configs/sample.yaml"), "run=s", "train.epochs=1", "encoder.image_size=32"),
    ("evaluate.py", "--run", "offline"),
    ("evaluate.py", "--compare", "offline"),
    ("inference_visualize.py", "--run", "offline"),
    ("visualize_loss.py", "--run", "offline"),
    ("data/annotations.py", "archive"),
    ("calibrate.py", "--run", "s"),
)


def blocked(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process where each attempt to reach the network is reported and fails."""
    command = [sys.executable, "-c", BLOCKED, str(ROOT), str(ROOT / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_offline(tally: Tally) -> None:
    """scripts with sockets blocked"""
    for script, *words in SCRIPTS:
        ended = blocked(script, *words)
        tally(ended.returncode == 0 and "BLOCKED" not in ended.stderr, script, ended.stderr)
    download = blocked("data/download.py", "flickr8k")
    fine = download.returncode == 2 and "error: cannot download https://" in download.stderr
    tally(fine and "Traceback" not in download.stderr, "a dataset that has to be downloaded", download.stderr)
    needs = blocked("train.py", *SMALLEST, "run=weights", "encoder.weights=IMAGENET1K_V1")
    cached = (Path.home() / ".cache/torch/hub/checkpoints").is_dir()
    fine = needs.returncode == 2 and "cannot download https://download.pytorch.org" in needs.stderr
    tally(fine or (cached and needs.returncode == 0), "weights that have to be downloaded", needs.stderr)
