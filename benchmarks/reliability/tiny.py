"""A dataset of twelve drawn scenes and the smallest captioner: trained in a second, by the same code as the large."""

from cli import run_script

import csv
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import sample

SMALLEST = (
    *("encoder.name=resnet18", "encoder.weights=null", "encoder.image_size=32", "data.min_count=1"),
    *("decoder.embed_size=16", "decoder.hidden_size=32", "train.batch_size=20", "train.precision=fp32"),
    *("data.shard_rows=4", "train.epochs=4", "train.warmup_steps=2", "train.log_every=1", "train.checkpoint_every=1"),
)


def write_dataset(root: Path) -> None:
    """Write twelve pictures, eight for train, two for val, two for test, with five captions each."""
    (root / "images").mkdir(parents=True)
    rows = [("image", "caption")]
    for number, (_, scene) in enumerate(sample.choose_scenes()[:12]):
        name = f"{number:02}.jpg"
        sample.draw_scene(scene, np.random.default_rng(number)).resize((64, 64)).save(root / "images" / name)
        rows += [(name, caption) for caption in sample.describe(scene)]
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    for split, numbers in {"train": range(8), "dev": range(8, 10), "test": range(10, 12)}.items():
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{number:02}.jpg\n" for number in numbers))


def fork(main: Callable[[], int | None], words: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """Run a script's `main` in a child that has all imports already, so that it starts at once; returns its pid.

    POSIX only. What it prints is added to `log`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        sys.argv = ["script.py", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what runs in the background
        prepare()
        code = run_script(main)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
