"""Check that a run survives what happens to it, and that hostile files do no harm.

    python -m benchmarks.reliability                      # all: some hours on two cores
    python -m benchmarks.reliability kills_at_acts clock  # or some of them

Updates the rows in benchmarks/results/reliability.json, from which docs/reliability.md is written. Linux; some checks
need root (memory disks, another user), Chromium, faketime or atheris.
"""

from cli import UserError, run_script

import argparse
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.reliability import faults, fuzz, kills, long_runs, offline, strangers
from benchmarks.reliability.kills import Result
from benchmarks.reliability.page import PAGE, RESULTS, write_page
from utils import write_atomically

CHECKS: dict[str, tuple[str, Callable[[], Result]]] = {
    "random_kills": ("SIGKILL at a random moment, then --resume", kills.random_kills),
    "kills_at_acts": (
        "SIGKILL before or after the Nth write, flush, fsync or rename, then --resume",
        kills.kills_at_acts,
    ),
    "sigterm": ("SIGTERM at a random moment, then --resume", partial(kills.stops, signal.SIGTERM)),
    "ctrl_c": ("Ctrl-C at a random moment, then --resume", partial(kills.stops, signal.SIGINT)),
    "full_disk": ("a disk that is full in the middle of training", faults.full_disk),
    "read_only": ("folders mounted read-only", faults.read_only),
    "no_permission": ("files and folders without permission", faults.no_permission),
    "vanishing": ("files that vanish during training", faults.vanishing),
    "clock": ("a clock that goes backwards between killing and resuming", faults.clock_backwards),
    "two_at_once": ("two trainings in one run's folder", faults.two_at_once),
    "cut_checkpoints": ("a checkpoint cut at each multiple of 4 KB", strangers.cut_checkpoints),
    "evil_checkpoints": (
        "checkpoints with code, absurd shapes, bombs, or parts that do not fit",
        strangers.evil_checkpoints,
    ),
    "odd_pictures": ("pictures of all kinds: bombs, broken, animated, 16-bit, links, pipes …", strangers.odd_pictures),
    "evil_archives": ("archives that write elsewhere or swell", strangers.evil_archives),
    "hostile_captions": ("captions that would act in the page, in Chromium", strangers.hostile_captions),
    "hostile_demo": ("words and file names that would act in the demo, in Chromium", strangers.hostile_demo),
    **{f"fuzz_{name}": (f"fuzzing: {name}", partial(fuzz.both, name)) for name in [*fuzz.TASTERS, "state"]},
    "many_epochs": ("2,000 epochs", long_runs.many_epochs),
    "many_captions": ("100,000 captions", long_runs.many_captions),
    "large_gallery": ("a page of 20,000 pictures in Chromium", long_runs.large_gallery),
    "poisoned": ("learning rates at which the loss explodes", long_runs.poisoned),
    "offline": ("every script with sockets blocked", offline.offline),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    args = parser.parse_args()
    unknown = [name for name in args.checks if name not in CHECKS]
    if unknown:
        raise UserError(f"there is no check {unknown[0]}; take some of {', '.join(CHECKS)}")
    torch.set_num_threads(1)  # children are forked: none may find a lock held by a thread it has not
    for name in args.checks or CHECKS:
        title, check = CHECKS[name]
        print(f"== {name}: {title}", flush=True)
        keep(name, title, check())
    print(f"wrote {RESULTS} and {PAGE}")


def keep(name: str, title: str, result: Result) -> None:
    """Put a row in the place of the one that the check had before, in the order of CHECKS."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    command = f"python -m benchmarks.reliability {name}"
    row = {"check": title, "tried": result.tried, "lost": result.lost, "figures": result.figures, "command": command}
    rows = [each for each in rows if each["command"] != command] + [row]
    order = [f"python -m benchmarks.reliability {each}" for each in CHECKS]
    rows.sort(key=lambda each: order.index(each["command"]))
    write_atomically(RESULTS, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    write_page()
    print(f"{name}: tried {result.tried:,}, lost {result.lost} {result.figures}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(run_script(main))
