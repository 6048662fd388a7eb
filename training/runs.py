"""A run's folder, `runs/<name>/`: begun, kept, gone on with, and its loss log."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from config import Config, UserError, restore_config
from data import annotations
from utils import RUNS, find_run, load_checkpoint, write_atomically

LOG_COLUMNS = ("epoch", "step", "lr", "train_loss", "val_loss", "val_perplexity", "val_bleu4", "val_cider")
WRITTEN = (
    *("config.yaml", annotations.SAVED_SPLITS, "checkpoints.pth", "last.pth", "loss_log.txt"),
    *("captions_result.html", "predictions.json", "loss_curve.png"),
    *(f"{what}-{split}.json" for what in ("scores", "predictions") for split in annotations.SPLITS),
)
RESUMED = ("optimiser", "progress", "nll", "averaged")  # what last.pth holds beside the model


def resume(args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """Return config and last.pth of the run to go on with; `args.overrides` keeps what is not its name."""
    names = [word.removeprefix("run=") for word in args.overrides if word.startswith("run=")]
    args.overrides = [word for word in args.overrides if not word.startswith("run=")]
    run = find_run("last.pth", args.run or next(iter(names), None))
    if run.resolve().parent != RUNS.resolve():
        raise UserError(f"{run} is not below {RUNS}/; move it there to go on with it")
    saved = load_checkpoint(run / "last.pth")
    missing = {"config", *RESUMED} - saved.keys()
    if missing:
        raise UserError(f"{run / 'last.pth'} lacks its {sorted(missing)[0]}, so training cannot go on; train again")
    return restore_config(saved["config"] | {"run": run.name}, args.overrides), saved


def refuse_existing(run: Path, args: argparse.Namespace, config: Config) -> None:
    """Raise UserError rather than write over a run; only the sample's own is started again without being asked."""
    if args.resume or args.overwrite or not run.exists():
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
    shutil.rmtree(run / "outputs", ignore_errors=True)
    write_atomically(run / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    write_atomically(run / annotations.SAVED_SPLITS, json.dumps(annotations.splits_of(table)).encode())


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    """Write the loss log whole: tab-separated, a header, one row per epoch."""
    rows = [[str(row[column]) for column in LOG_COLUMNS] for row in history]
    write_atomically(path, "".join("\t".join(cells) + "\n" for cells in [LOG_COLUMNS, *rows]).encode())
