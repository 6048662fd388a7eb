"""Checkpoints and pictures from strangers are used as they are meant, or refused in one sentence; fuzzing."""

import builtins
import functools
import io
import json
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from fuzz import GROWTH, memory
from PIL import Image

from cli import UserError
from data.transforms import MOST_PIXELS
from stress.conftest import Tally
from stress.runs import refused, run
from utils import load_checkpoint

EVIL = Path("evil.pth")


def is_refused(function: Callable[[], object]) -> bool:
    """Whether a function refuses in one sentence, and without taking much memory."""
    before = memory()
    try:
        function()
    except UserError as error:
        return "\n" not in str(error) and memory() - before < GROWTH
    return False


def test_cut_checkpoints(tally: Tally, whole: Path) -> None:
    """a checkpoint cut at each multiple of 4 KB"""
    path = whole / "last.pth"
    step = 4096 * (100 if tally.short else 1)
    for size in range(path.stat().st_size // step * step, -1, -step):
        os.truncate(path, size)
        tally(is_refused(lambda: load_checkpoint(path)), f"cut at {size}")


class Call:
    """Pickles as a call of `function`, which a careless unpickler makes."""

    def __init__(self, function: Callable, *words: object) -> None:
        self.call = function, words

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def test_evil_checkpoints(tally: Tally, whole: Path) -> None:
    """checkpoints with code in them, or a bomb"""
    good = load_checkpoint(whole / "checkpoints.pth")
    target = Path("acted").resolve()
    calls = [
        Call(os.system, f"touch {target}"),
        Call(builtins.eval, f"open({str(target)!r}, 'w')"),
        Call(builtins.exec, f"open({str(target)!r}, 'w')"),
        Call(subprocess.call, ["touch", str(target)]),
        Call(Path.touch, target),
        Call(torch.load, str(target)),
        Call(builtins.getattr, "a", "join"),
    ]
    for number, call in enumerate(calls):
        for where in (call, {"format": good["format"], "config": call}, [call], good | {"decoder": {"a": call}}):
            torch.save(where, EVIL)
            tally(is_refused(lambda: load_checkpoint(EVIL)), f"call {number} in a zip")
            EVIL.write_bytes(pickle.dumps(where))
            tally(is_refused(lambda: load_checkpoint(EVIL)), f"call {number} in a pickle")
            tally(not target.exists(), f"call {number} acted")

    laughs: list = []
    for _ in range(9):
        laughs = [laughs] * 10  # a billion lists, of which the file holds nine
    bombs: dict[str, dict[str, Any]] = {
        "a tensor beyond its bytes": {"decoder": {"a": torch.zeros(1).expand(1_000_000_000)}},
        "a billion lists": {"config": {"a": laughs}},
        "deep lists": {"config": json.loads(f'{{"a": {"[" * 300}{"]" * 300}}}')},
        "a long text": {"config": {"a": "a" * 20_000_000}},
        "many names": {"config": dict.fromkeys(range(5_000_000))},
    }
    for what, content in bombs.items():
        for in_zip in (True, False):
            torch.save(good | content, EVIL, _use_new_zipfile_serialization=in_zip)
            tally(refused(*run(load_bomb)), what)
    with zipfile.ZipFile(whole / "last.pth") as old, zipfile.ZipFile(EVIL, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as file:
                file.write(old.read(name))
                for _ in range(1000 if name.endswith("data/0") else 0):
                    file.write(bytes(1_000_000))
    tally(refused(*run(load_bomb)), "a zip that swells to a gigabyte")


def load_bomb() -> None:
    """Load EVIL in this process; raises RuntimeError where that takes much memory, refused or not."""
    before = memory()
    try:
        load_checkpoint(EVIL)
    finally:
        if memory() - before > GROWTH:
            raise RuntimeError(f"{memory() - before:.0f} MB more")


def test_odd_pictures(tally: Tally, whole: Path) -> None:
    """pictures that are bombs, links, pipes or no pictures, or have names that would act"""
    scene = Image.open("archive/images/00.jpg").convert("RGB")
    captioned: dict[str, Callable[[Path], object]] = {
        "one.png": scene.resize((1, 1)).save,
        "wide.png": scene.resize((30_000, 10)).save,
        "high.png": scene.resize((10, 30_000)).save,
        "moving.gif": functools.partial(scene.save, save_all=True, append_images=[scene.rotate(90)]),
        "\u202egpj.exe.jpg": scene.save,
        "<img src=x onerror=alert(1)>.jpg": scene.save,
        os.fsdecode(b"caf\xe9.jpg"): scene.save,
    }
    skipped: dict[str, Callable[[Path], object]] = {
        "bomb.png": Image.new("1", (20_000, 20_000)).save,
        "small-bomb.png": Image.new("1", (10_000, 9_000)).save,
        "empty.jpg": Path.touch,
        "postscript.jpg": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    }
    no_files: dict[str, Callable[[Path], object]] = {  # nobody asks for them
        "folder.jpg": Path.mkdir,
        "loop.jpg": lambda path: path.symlink_to(path.name),
        "up": lambda path: path.symlink_to(".."),
        "pipe.jpg": os.mkfifo,
    }
    Path("odd").mkdir()
    for name, write in (captioned | skipped | no_files).items():
        write(Path("odd", name))
    script = [sys.executable, str(fuzz.ROOT / "inference_visualize.py")]  # a process without pytest's own warnings
    words = ["--images", "odd", "--out", "captioned", "--checkpoint", str(whole / "checkpoints.pth")]
    ended = subprocess.run([*script, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ended.stdout
    tally(ended.returncode == 0 and "Traceback" not in said, "the folder", said)
    rows = json.loads(Path("captioned/predictions.json").read_text(encoding="utf-8"))
    found = {Path(row["image_id"]).name for row in rows}
    for name in captioned:
        tally(name in found, f"{name!a} was not captioned")
    for name in skipped:
        tally(name not in found and f"skipped: cannot read the picture odd/{name}" in said, name, said)
    tally(found == captioned.keys(), "others were captioned", str(found - captioned.keys()))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_fuzzing(tally: Tally, name: str) -> None:
    """fuzzing"""
    if name == "picture":  # what counts is memory beyond that of the largest one that is read
        side, largest = math.isqrt(MOST_PIXELS), io.BytesIO()
        Image.new("RGBA", (side, side)).save(largest, "PNG", compress_level=1)
        fuzz.check(name, largest.getvalue())
    seconds, before, began = 1 if tally.short else 300, memory(), time.monotonic()
    while time.monotonic() - began < seconds:
        tally.tried += fuzz.check_inputs(name, 20 if tally.short else 100)
    grown = memory() - before
    tally.lost = int(grown > GROWTH)
    tally.figures = f"in {seconds} s; {grown:+.0f} MB"
