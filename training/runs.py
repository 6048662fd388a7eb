"""A run's folder, `runs/<name>/`: creating, locking and resuming it, and its loss log."""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import distributed
from cli import UserError, say
from cli.options import PROJECT, choose_config
from config import Config, restore_config
from data import splits
from models import consensus
from models.checkpoint import check_parts
from training.boards import TENSORBOARD, WANDB
from utils import RUNS, find_run, hold, load_checkpoint, save_checkpoint, write_atomically

LOG_COLUMNS = ("epoch", "step", "lr", "train_loss", "val_loss", "val_perplexity", "val_bleu4", "val_cider")
BY_TRAINING = ("last.pth", "checkpoints.pth", consensus.FILE, "loss_log.txt", "config.yaml", splits.SAVED_SPLITS)
WRITTEN = (
    *BY_TRAINING,
    *("captions_result.html", "predictions.json", "captions.csv", "captions.jsonl", "loss_curve.png"),
    *(f"{what}-{split}.json" for what in ("scores", "predictions") for split in splits.SPLITS),
)
FOLDERS = ("outputs", "export")  # made of a checkpoint

LOCK = ".lock"


@dataclass
class Run:
    """A run that is open for training; `saved` is the content of last.pth if it is resumed."""

    config: Config
    saved: dict[str, Any] | None = None
    accept_changes: bool = False  # of captions and splits since the run began

    def __post_init__(self) -> None:
        self.name, self.folder = self.config.run, RUNS / self.config.run
        self.last, self.best = self.folder / "last.pth", self.folder / "checkpoints.pth"

    def saved_splits(self) -> dict[str, list[str]] | None:
        return splits.read_splits(self.folder) if self.saved else None

    def begin(self, table: pd.DataFrame, digests: Callable[[], dict[str, str]]) -> None:
        """Remove what an earlier run wrote to the folder; write the resolved config and every picture's split.

        The sample, which is trained again without being asked, is kept until its first new checkpoint is there.
        """
        if distributed.rank() == 0:
            if self.config.data.format != "sample":
                self.remove(WRITTEN)
            for name in (TENSORBOARD, WANDB):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for path in self.folder.glob("step-*.pth"):
                path.unlink()
            config = yaml.safe_dump(self.config.model_dump(), sort_keys=False)
            write_atomically(self.folder / "config.yaml", config.encode())
            self.write_splits(table, digests)

    def write_splits(self, table: pd.DataFrame, digests: Callable[[], dict[str, str]]) -> None:
        content = {**splits.splits_of(table), splits.DIGESTS: digests()}
        write_atomically(self.folder / splits.SAVED_SPLITS, json.dumps(content).encode())

    def check_data(self, table: pd.DataFrame, digests: Callable[[], dict[str, str]]) -> None:
        """Raise UserError where a resumed run has other captions or splits than it began with, unless told to go on
        with them: what it chooses by could be what it has learned. For the first process alone.
        """
        saved = splits.read_saved(self.folder)
        if saved is None:
            said = f"its {splits.SAVED_SPLITS} is lost, so nobody knows what it was trained on"
        elif splits.DIGESTS in saved and saved[splits.DIGESTS] != digests():
            said = splits.what_changed(saved, table)
        else:
            return
        if not self.accept_changes:
            raise UserError(
                f"the data of {self.folder} has changed since it began: {said}; put it back, start another run, or go "
                f"on with it as it is: python train.py --resume --run {self.name} --changed-data"
            )
        say(f"going on with other data than {self.folder} began with: {said}")
        self.write_splits(table, digests)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def keep_best(self, checkpoint: dict[str, Any]) -> None:
        """Write checkpoints.pth; after the first epoch, remove what was made of an earlier one."""
        if distributed.rank() == 0:
            save_checkpoint(self.best, checkpoint)
            if checkpoint["scores"]["epoch"] == 1:
                self.remove(set(WRITTEN) - set(BY_TRAINING))

    def keep_step(self, step: int, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint of a step beside the others, for `train.keep_every`."""
        if distributed.rank() == 0:
            save_checkpoint(self.folder / f"step-{step:07}.pth", checkpoint)

    def log(self, history: list[dict[str, float]]) -> None:
        """Write loss_log.txt whole: tab-separated, a header, one row per epoch."""
        if distributed.rank() == 0 and (history or not (self.folder / "loss_log.txt").is_file()):
            rows = [[str(row[column]) for column in LOG_COLUMNS] for row in history]
            text = "".join("\t".join(cells) + "\n" for cells in [LOG_COLUMNS, *rows])
            write_atomically(self.folder / "loss_log.txt", text.encode())


@contextlib.contextmanager
def open_run(args: argparse.Namespace) -> Iterator[Run]:
    """Open the run that the command line asks for, a new one or one to resume, and lock its folder for the block.

    Raises UserError rather than write over a run, and while another process trains in its folder.
    """
    if distributed.restarts() and not args.resume:  # by torchrun, in the place of a process that died
        name = choose_config(args)[0].run
        args.resume, args.overwrite = (RUNS / name / "last.pth").is_file(), True
        if args.resume:
            args.run, args.config, args.overrides = name, None, []
    run = resume(args) if args.resume else begin(args)
    with contextlib.ExitStack() as stack:
        if args.quiet:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        distributed.on_first_rank(stack.enter_context, locked(run.folder))
        if not args.resume and not args.overwrite:
            distributed.on_first_rank(refuse_existing, run)
        yield run


def begin(args: argparse.Namespace) -> Run:
    """Return a new run, of the recipe asked for, and say where it goes."""
    config, note = choose_config(args)
    if note and not args.quiet:
        say(note)
    if Path.cwd() != PROJECT and not args.quiet:
        say(f"writing to {RUNS.resolve() / config.run}, and to the cache {Path(config.data.cache).resolve()}")
    return Run(config)


def resume(args: argparse.Namespace) -> Run:
    """Return the run to resume, from its last.pth."""
    folder = find_run("last.pth", args.run)
    if folder.resolve().parent != RUNS.resolve():
        raise UserError(f"{folder} is not below {RUNS}/; move it there to resume it")
    saved = load_checkpoint(folder / "last.pth")
    check_parts(saved, str(folder / "last.pth"))
    config = restore_config(saved["config"] | {"run": folder.name}, args.overrides)
    return Run(config, saved, args.changed_data)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder until the block or the process ends.

    Raises UserError when another process trains there already.
    """
    advice = "wait until it ends, stop it, or start another run: run=NAME"
    try:
        with hold(folder / LOCK, f"training in {folder}", advice):
            for name in BY_TRAINING:  # what a write that was killed has left
                for path in folder.glob(f".{name}.*"):
                    path.unlink()
            yield
    finally:
        with contextlib.suppress(OSError):  # leave no folders where training could not begin
            if {path.name for path in folder.iterdir()} == {LOCK}:
                (folder / LOCK).unlink()
                folder.rmdir()
                folder.parent.rmdir()


def refuse_existing(run: Run) -> None:
    """Raise UserError rather than write over a run; only the sample's own is started again without being asked."""
    before_training = ("config.yaml", splits.SAVED_SPLITS)  # of a run killed before its first checkpoint
    if all(path.name in before_training or path.name.startswith(LOCK) for path in run.folder.iterdir()):
        return
    if run.name == "sample" and run.config.data.format == "sample":
        say(f"{run.folder} is started again (name another run with run=NAME to keep it)")
        return
    raise UserError(
        f"{run.folder} already exists; resume it: python train.py --resume --run {run.name}, start another: run=NAME, "
        "or replace it: --overwrite"
    )
