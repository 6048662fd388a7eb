"""A run's folder, `runs/<name>/`: begun, kept, gone on with, and its loss log."""

from cli import UserError

import argparse
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from config import Config, restore_config
from data import annotations
from training import tensorboard
from utils import RUNS, find_run, load_checkpoint, write_atomically

LOG_COLUMNS = ("epoch", "step", "lr", "train_loss", "val_loss", "val_perplexity", "val_bleu4", "val_cider")
BY_TRAINING = ("last.pth", "checkpoints.pth", "loss_log.txt", "config.yaml", annotations.SAVED_SPLITS)
WRITTEN = (
    *BY_TRAINING,
    *("captions_result.html", "predictions.json", "loss_curve.png"),
    *(f"{what}-{split}.json" for what in ("scores", "predictions") for split in annotations.SPLITS),
)
FOLDERS = ("outputs", "export", tensorboard.FOLDER)
RESUMED = ("optimiser", "progress", "nll", "averaged")  # what last.pth holds beside the model

LOCK, HOLDER = ".lock", ".holder"  # the lock, and who has it: on Windows a locked file cannot be read
PATIENCE = 10  # seconds; the picture readers of a trainer that was killed outlive it by some 5, and keep its lock


@contextlib.contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep a run's folder for this process until the block ends, or the process does, in whatever way.

    Raises UserError, naming it, when another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"{run} is being trained by {read_holder(run)}; wait for its end, stop it, or train another: run=NAME"
        ) from None
    try:
        write_atomically(run / HOLDER, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for name in (*BY_TRAINING, HOLDER):  # what a write that was killed has left
            for path in run.glob(f".{name}.*"):
                path.unlink()
        yield
    finally:
        (run / HOLDER).unlink(missing_ok=True)
        lock.release()
        remove_empty(run)


def read_holder(run: Path) -> str:
    with contextlib.suppress(OSError):
        return (run / HOLDER).read_text(encoding="utf-8")
    return "another process"


def is_begun(run: Path) -> bool:
    """Whether a folder holds more than training leaves when it is killed before its first checkpoint."""
    return any(path.name not in ("config.yaml", annotations.SAVED_SPLITS, LOCK, HOLDER) for path in run.iterdir())


def remove_empty(run: Path) -> None:
    """Leave no folders where training could not begin."""
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} == {LOCK}:
            (run / LOCK).unlink()
            run.rmdir()
            run.parent.rmdir()


def resume(args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """Return config and last.pth of the run to go on with; `args.overrides` keeps what is not its name."""
    if args.config:
        raise UserError("--resume goes on with a run's own settings; leave --config out and name the run: --run NAME")
    names = [word.removeprefix("run=") for word in args.overrides if word.startswith("run=")]
    args.overrides = [word for word in args.overrides if not word.startswith("run=")]
    run = find_run("last.pth", args.run or next(iter(names), None))
    if run.resolve().parent != RUNS.resolve():
        raise UserError(f"{run} is not below {RUNS}/; move it there to go on with it")
    saved = load_checkpoint(run / "last.pth")
    missing = {"config", *RESUMED} - saved.keys()
    if missing:
        raise UserError(
            f"{run / 'last.pth'} lacks its {sorted(missing)[0]}, so training cannot go on; start the run again"
        )
    return restore_config(saved["config"] | {"run": run.name}, args.overrides), saved


def refuse_existing(run: Path, args: argparse.Namespace, config: Config) -> None:
    """Raise UserError rather than write over a run; only the sample's own is started again without being asked."""
    if args.resume or args.overwrite or not is_begun(run):
        return
    if config.run == "sample" and config.data.format == "sample":
        print(f"{run} is started again (name another run with run=NAME to keep it)")
        return
    raise UserError(
        f"{run} exists already; go on with it: --resume --run {run.name}, "
        "keep it and start another: run=NAME, or lose it: --overwrite"
    )


def start_run(run: Path, config: Config, table: pd.DataFrame) -> None:
    """Clear the run's folder of what an earlier run wrote; write the resolved config and every picture's split."""
    for name in WRITTEN:
        (run / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)
    write_atomically(run / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    write_atomically(run / annotations.SAVED_SPLITS, json.dumps(annotations.splits_of(table)).encode())


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    """Write the loss log whole: tab-separated, a header, one row per epoch."""
    rows = [[str(row[column]) for column in LOG_COLUMNS] for row in history]
    write_atomically(path, "".join("\t".join(cells) + "\n" for cells in [LOG_COLUMNS, *rows]).encode())
