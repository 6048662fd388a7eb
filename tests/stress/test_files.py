"""Checkpoints, pictures and archives from strangers are used as they are meant, or refused in one sentence; fuzzing."""

from cli import UserError

import builtins
import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from fuzz import GROWTH, memory
from PIL import Image

import inference_visualize
from data import download
from models.checkpoint import load_model
from stress.conftest import Tally
from stress.runs import run
from utils import load_checkpoint, save_checkpoint

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
    """checkpoints with code, absurd shapes, bombs, or parts that do not fit"""
    good = load_checkpoint(whole / "checkpoints.pth")
    for name, change in absurd(good).items():
        save_checkpoint(EVIL, good | change)
        tally(is_refused(lambda: load_model(EVIL)), name)

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

    with zipfile.ZipFile(whole / "last.pth") as old, zipfile.ZipFile(EVIL, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(200_000_000) if name.endswith("data/0") else old.read(name))
    tally(is_refused(lambda: load_checkpoint(EVIL)), "a bomb")


def absurd(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is put in the place of parts of a good checkpoint."""
    config, decoder, words = good["config"], good["decoder"], good["vocabulary"]["words"]

    def settings(section: str, **values: object) -> dict[str, Any]:
        return {"config": config | {section: config[section] | values}}

    def vocabulary(changed: list) -> dict[str, Any]:
        return {"vocabulary": good["vocabulary"] | {"words": changed}}

    return {
        "a vocabulary with more words": vocabulary([*words, "zebra"]),
        "a vocabulary with fewer words": vocabulary(words[:-1]),
        "a vocabulary without special words": vocabulary(words[4:]),
        "a vocabulary of numbers": vocabulary(list(range(len(words)))),
        "a huge layer": settings("decoder", hidden_size=10**12),
        "the largest layers": settings("decoder", hidden_size=8192, embed_size=8192, num_layers=64),
        "the largest backbone": settings("encoder", name="regnet_y_128gf"),
        "one number for 10^12": {"feature_mean": torch.ones(1).expand(10**12)},
        "one number for all": {"decoder": {name: torch.ones(1).expand(each.shape) for name, each in decoder.items()}},
        "double precision": {"decoder": {name: each.double() for name, each in decoder.items()}},
        "NaN": {"decoder": {name: each * float("nan") for name, each in decoder.items()}},
        "no decoder": {"decoder": {}},
        "another kind of decoder": settings("decoder", name="transformer"),
        "an unknown setting": settings("decoder", heads_up=7),
        "a transform of nothing": {"transform": {}},
    }


@pytest.mark.filterwarnings(
    "error::PIL.Image.DecompressionBombWarning"
)  # as data.transforms asks, but pytest resets it
def test_odd_pictures(tally: Tally, whole: Path) -> None:
    """pictures of all kinds: bombs, broken, animated, 16-bit, links, pipes …"""
    file = Path("archive/images/00.jpg")
    scene = Image.open(file).convert("RGB")
    moving = partial(scene.save, save_all=True, append_images=[scene.rotate(90)])
    turned = Image.Exif()
    turned[0x0112] = 6
    captioned: dict[str, Callable[[Path], object]] = {
        "one.png": scene.resize((1, 1)).save,
        "wide.png": scene.resize((30_000, 10)).save,
        "high.png": scene.resize((10, 30_000)).save,
        **{"moving.gif": moving, "moving.webp": moving},
        "print.jpg": scene.convert("CMYK").save,
        "sixteen.png": Image.new("I;16", (40, 40), 40_000).save,
        "turned.jpg": partial(scene.save, exif=turned),
        "clear.png": scene.convert("RGBA").save,
        "png.jpg": partial(scene.save, format="PNG"),
        "\u202egpj.exe.jpg": scene.save,
        "<img src=x onerror=alert(1)>.jpg": scene.save,
        os.fsdecode(b"caf\xe9.jpg"): scene.save,
    }
    skipped: dict[str, Callable[[Path], object]] = {
        "bomb.png": Image.new("1", (20_000, 20_000)).save,
        "small-bomb.png": Image.new("1", (10_000, 9_000)).save,
        "empty.jpg": Path.touch,
        "cut.jpg": lambda path: path.write_bytes(file.read_bytes()[:700]),
        "text.jpg": lambda path: path.write_text("no picture"),
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
    model = ["--checkpoint", str(whole / "checkpoints.pth")]
    code, said = run(inference_visualize.main, "--images", "odd", "--out", "captioned", *model)
    tally(code == 0 and "Traceback" not in said, "the folder", said)
    rows = json.loads(Path("captioned/predictions.json").read_text(encoding="utf-8"))
    found = {Path(row["image_id"]).name for row in rows}
    for name in captioned:
        tally(name in found, f"{name!a} was not captioned")
    for name in skipped:
        tally(name not in found and f"skipped: cannot read the picture odd/{name}" in said, name, said)
    tally(found == captioned.keys(), "others were captioned", str(found - captioned.keys()))


def test_evil_archives(tally: Tally) -> None:
    """archives that write elsewhere or swell"""
    names = [
        "../evil",
        "/evil",
        "a/../../evil",
        "..\\evil",
        "C:\\evil",
        "\\\\host\\evil",
        "a/b/../../../evil",
        "./../evil",
    ]
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    entries = [*((zipfile.ZipInfo(name), b"a wolf") for name in names), (link, b"/etc")]
    for entry, content in [*entries, (zipfile.ZipInfo("zeros"), bytes(300_000_000))]:
        with tempfile.TemporaryDirectory() as folder:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED if len(content) > 100 else None)
            Path(folder, "a.zip").write_bytes(buffer.getvalue())
            source, inside = download.Source("https://a.invalid/a.zip", 10, None), Path(folder, "in")
            fine = is_refused(partial(download.fetch, [source], inside, folder))
            written = {path.name for path in Path(folder).rglob("*")}
            tally(fine and written == {"a.zip", "in", "a.zip.part"}, entry.filename, str(written))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_fuzzing(tally: Tally, name: str) -> None:
    """fuzzing"""
    if name == "picture":  # what counts is memory beyond that of the largest one that Pillow's limit lets through
        side, largest = math.isqrt(Image.MAX_IMAGE_PIXELS or 0), io.BytesIO()
        Image.new("RGBA", (side, side)).save(largest, "PNG", compress_level=1)
        fuzz.check(name, largest.getvalue())
    seconds, before, counts = (2 if tally.short else 600), memory(), {"hypothesis": 0}
    began = time.monotonic()
    while time.monotonic() - began < seconds / 2:
        counts["hypothesis"] += fuzz.by_hypothesis(name, 20 if tally.short else 100)
    if name != "state" and (importlib.util.find_spec("atheris") or not tally.short):
        counts["atheris"] = fuzz.by_atheris(name, seconds / 2)
    grown = memory() - before
    tally.tried, tally.lost = sum(counts.values()), int(grown > GROWTH)
    engines = ", ".join(f"{count:,} by {engine}" for engine, count in counts.items())
    tally.figures = f"{engines}, in {seconds} s; {grown:+.0f} MB"
