"""A power cut after any call on a file, by what the calls promise: a model of a disk, and no real one is cut off."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from cli import UserError
from stress import runs
from stress.conftest import Tally
from stress.disk import STRACE, Disk, State, read_calls
from utils import load_checkpoint

ROOT = Path(train.__file__).parent
RUN, CACHE = Path("runs/power"), Path("cache-power")
pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")


def test_power_cuts(tally: Tally, archive: Path) -> None:
    """a power cut after each call on files, by a model of the disk, then --resume"""
    runs.save_backbone()  # strace lists all that is written
    log = Path("power.log").resolve()
    Path("calls").mkdir()
    script = [sys.executable, str(ROOT / "train.py"), *runs.start("power"), runs.BACKBONE]
    with open(log, "w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*STRACE, "-o", "calls/of", *script], check=True, stdout=output, env=environment)

    disk, text = Disk(Path.cwd()), b""
    found: dict[frozenset, tuple[str, State, int]] = {}
    for number, call in enumerate(read_calls(Path("calls"))):
        if call.name == "write" and os.fsdecode(call.texts[0]) == str(log):
            text += call.texts[1]
        elif not disk.do(call):
            continue
        steps = text.count(b"] Step [") - (b"wrote runs/power/" not in text)  # all that it has said, but for the last
        for what, state in disk.states().items():
            found[frozenset(state.items())] = f"{what}, call {number}: {call.name}", state, steps
    end = {path: path.read_bytes() for folder in (RUN, CACHE) for path in folder.rglob("*") if path.is_file()}
    assert disk.states()["everything"] == end

    RUN.rename("runs/undisturbed")
    states = list(found.values())
    for what, state, steps in states:
        fault = find_fault(state, end, steps)
        tally(not fault, what, fault)
    resumed = [states[i] for i in np.linspace(0, len(states) - 1, 6 if tally.short else 100).astype(int)]
    for what, state, _ in resumed:
        for folder in (RUN, CACHE):
            shutil.rmtree(folder, ignore_errors=True)
        for path, content in state.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        code, said = runs.run(train.main, *runs.start_or_resume("power", runs.BACKBONE))
        tally(code == 0 and not runs.differs("power", "undisturbed"), f"resumed from {what}", said)
    tally.figures = f"{len(states)} states of the disk, {len(resumed)} resumed and compared bit for bit"


def find_fault(state: State, end: State, steps: int) -> str:
    """Return what is wrong with files that a power cut left, when a run's log had promised so many steps."""
    if RUN / "last.pth" in state:
        missing = [path for path in end if path.name in ("config.yaml", "splits.json") and path not in state]
        if missing:
            return f"no {missing} beside last.pth"
    elif steps >= 0:
        return f"no last.pth, after {steps} steps"
    for path, content in state.items():
        if path.name.startswith((".", "lock")):  # what nobody reads, or not for long
            continue
        if path.suffix == ".pth":
            Path("left.pth").write_bytes(content)
            try:
                saved = load_checkpoint("left.pth")
            except UserError as error:
                return f"{path}: {error}"
            if path.name == "last.pth" and saved["progress"]["step"] < steps:
                return f"{path} is of step {saved['progress']['step']}, after {steps} steps"
        elif path.name == "loss_log.txt":
            if not end[path].startswith(content):
                return f"{path} is {content!r}"
        elif path.suffix == ".npy" and path.with_suffix(".json") not in state:
            continue  # nothing says that its rows count
        elif content != end[path]:
            return f"{path} is not what was written"
    return ""
