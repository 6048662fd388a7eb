"""Gives the readers of strangers' files anything there can be, and looks for what is not a UserError in one line.

    python -m benchmarks.reliability.fuzz config csv --engine atheris --seconds 600

`atheris` (pip install atheris; Linux and macOS) changes bytes and is led by what code they reach; `hypothesis` builds
inputs that are nearly right. An input that takes 20 seconds or lets memory grow by 300 MB is a fault, too.
"""

from cli import UserError

import argparse
import contextlib
import io
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import config
import render
from benchmarks.reliability.kills import Result
from benchmarks.reliability.tiny import SMALLEST
from config import load_config
from data import formats
from data.sample import choose_scenes, describe
from data.transforms import Transform, open_picture
from data.vocab import build_vocab
from models.consensus import Consensus
from models.model import CaptionModel
from utils import load_checkpoint

SLOWEST = 20  # seconds for one input
GROWTH = 300  # MB above what the imports take
SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))  # for each taster


Taster = Callable[[bytes], object]


def in_file(read: Callable[[Path], object], suffix: str = "") -> Taster:
    """Return a taster of bytes for a function that reads a file."""
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    path = folder / f"fuzz-{os.getpid()}{suffix}"

    def taste(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read(path)
        finally:
            path.unlink()

    return taste


def taste_override(content: bytes) -> None:
    words = content.decode(errors="replace").split("\n")
    load_config(overrides=words[:5])


def taste_pickle(content: bytes) -> None:
    """Take the bytes for the pickle inside a checkpoint whose zip is in order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, part in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": bytes(64)}.items():
            file.writestr(f"a/{name}", part)
    in_file(read_model)(buffer.getvalue())


def read_model(path: Path) -> None:
    CaptionModel.from_state(load_checkpoint(path), "a.pth")


def read_picture(path: Path) -> None:
    picture = open_picture(path)
    Transform(64).resize(picture)
    picture.thumbnail((render.LONGEST_SIDE[1],) * 2)
    render.draw_caption(picture, path.read_bytes()[-200:].decode(errors="surrogateescape"))


def draw_text(content: bytes) -> None:
    text = (
        content.decode("utf-16", errors="surrogatepass") if len(content) % 2 == 0 else content.decode(errors="replace")
    )
    width, height = (content + bytes(2))[:2]
    render.draw_caption(Image.new("RGB", (1 + width, 1 + height)), text)
    with tempfile.TemporaryDirectory() as folder, render.Gallery(Path(folder, "a.html"), text, text) as gallery:
        name = os.fsdecode(content)  # as files can be called
        gallery.add(name, [text], [text], size=(1 + width, 1 + height), name=name)


TASTERS: dict[str, Taster] = {
    "config": in_file(load_config),
    "override": taste_override,
    **{name: in_file(partial(formats.read, name=name)) for name in formats.READERS if name != "sample"},
    "recognised": in_file(formats.read),
    "checkpoint": in_file(read_model),
    "pickle": taste_pickle,
    "picture": in_file(read_picture),
    "drawer": draw_text,
}


def taste(name: str, content: bytes) -> None:
    """Give the bytes to a taster; what it may raise is a UserError in one line, or an OSError, which `cli` tells."""
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            TASTERS[name](content)
    except UserError as error:
        told = str(error)
        if len(told) > 2000:
            raise AssertionError(f"a message of {len(told)} characters") from error
    except OSError as error:
        if not error.strerror and not error.args:
            raise
    if time.monotonic() - began > SLOWEST:
        raise AssertionError(f"took {time.monotonic() - began:.0f} s")


# ---- inputs to begin with --------------------------------------------------------------------------------------------


def seeds(name: str) -> list[bytes]:
    """Return inputs that are right, for the fuzzer to change."""
    entry = {"image": "a.jpg", "captions": ["A dog.", "a cat"], "split": "train"}
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog."}]}
    sentences = [{"raw": "A dog."}]
    karpathy = {"images": [{"filename": "a.jpg", "split": "train", "cocoid": 1, "sentences": sentences}]}
    known: dict[str, list[bytes]] = {
        "config": [
            path.read_bytes() for path in [config.CONFIG_YAML, *config.CONFIG_YAML.parent.glob("configs/*.yaml")]
        ],
        "override": [b"train.lr=1e-3\ndecoder.name=lstm\nrun=a"],
        "csv": [b"image,caption\na.jpg,A dog.\n", b"image_name| comment_number| comment\na.jpg| 0| A dog.\n"],
        "token": [b"a.jpg#0\tA dog.\n", b"a.jpg#zhc#0 A dog.\n"],
        "karpathy": [json.dumps(karpathy).encode()],
        "coco": [json.dumps(coco).encode()],
        "ai_challenger": [json.dumps([{"image_id": "a.jpg", "caption": ["A dog."]}]).encode()],
        "jsonl": [json.dumps(entry).encode()],
        "picture": pictures(),
        "drawer": ["ab a dog 狗 \u202e".encode("utf-16")],
    }
    known["recognised"] = [text for kind in formats.READERS for text in known.get(kind, [])]
    if name in ("checkpoint", "pickle"):
        buffer = io.BytesIO()
        torch.save(checkpoint() | {"backbone": None, "format": "image-captioning/1"}, buffer)
        with zipfile.ZipFile(buffer) as content:
            [pickled] = [content.read(part) for part in content.namelist() if part.endswith("data.pkl")]
        known |= {"checkpoint": [buffer.getvalue()], "pickle": [pickled]}
    return known[name]


def pictures() -> list[bytes]:
    found = []
    for kind, mode in [
        *((kind, "RGB") for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")),
        ("GIF", "P"),
        ("PNG", "LA"),
    ]:
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((8, 8)).convert(mode).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def checkpoint() -> dict[str, Any]:
    """Return what the checkpoint of the smallest untrained model holds."""
    vocab = build_vocab([caption for _, scene in choose_scenes()[:12] for caption in describe(scene)], 1)
    model = CaptionModel.build(load_config(overrides=[*SMALLEST, "search.consensus=1"]), vocab)
    size = model.encoder.feature_shape[-1]
    model.consensus = Consensus(torch.eye(2, size), torch.zeros(size), torch.tensor([[4, 5], [5, 0]]), torch.arange(2))
    return model.state()


# ---- hypothesis ------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20) | st.sampled_from(["train", "a.jpg", "A dog.", "../a", "\ud800", "1e999", ""])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY = st.recursive(
    PLAIN, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3), max_leaves=8
)


def changed(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """Return the value with something in it, at any depth, in another's place."""
    if depth > 4 or not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 4)) == 0:
        return draw(ANY)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    copy = value.copy()
    if draw(st.integers(0, 9)) == 0 and isinstance(value, dict):
        del copy[key]
    else:
        copy[key] = changed(draw, value[key], depth + 1)
    return copy


def nearly_right(name: str) -> st.SearchStrategy[bytes]:
    """Return inputs that are right but for a part: files with other values, or with other bytes."""
    known = seeds(name)

    @st.composite
    def other_value(draw: st.DrawFn) -> bytes:
        return json.dumps(changed(draw, json.loads(draw(st.sampled_from(known))))).encode(errors="surrogatepass")

    @st.composite
    def other_bytes(draw: st.DrawFn) -> bytes:
        content = draw(st.sampled_from(known))
        first = draw(st.integers(0, len(content)))
        last = draw(st.integers(first, min(len(content), first + 40)))
        return (
            content[:first]
            + draw(st.binary(max_size=40) | TEXT.map(lambda t: t.encode(errors="replace")))
            + content[last:]
        )

    if name in ("karpathy", "coco", "ai_challenger", "jsonl"):
        return other_value() | other_bytes()
    return other_bytes() | st.binary(max_size=200)


def try_some(strategy: st.SearchStrategy[Any], function: Callable[[Any], object], most: int, again: bool = True) -> int:
    """Give a function so many inputs, the same ones each time if `again`; Hypothesis shrinks and shows what fails."""
    count = 0

    @settings(
        max_examples=most, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=again
    )
    @given(strategy)
    def check(content: Any) -> None:
        nonlocal count
        count += 1
        function(content)

    check()
    return count


def strategy_for(name: str) -> tuple[st.SearchStrategy[Any], Callable[[Any], object]]:
    """Return what to give, and to what: bytes to a taster, or, as `state`, changed values to a model."""
    if name != "state":
        return nearly_right(name), partial(taste, name)
    state = checkpoint()

    @st.composite
    def other(draw: st.DrawFn) -> Any:
        return changed(draw, state)

    return other(), build_from


def build_from(content: Any) -> None:
    with contextlib.suppress(UserError):
        if isinstance(content, dict):
            CaptionModel.from_state(content, "a.pth")


def by_hypothesis(name: str, seconds: float) -> int:
    """Give it inputs for so long; returns how many."""
    strategy, function = strategy_for(name)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        count += try_some(strategy, function, 100, again=False)
    return count


# ---- atheris ---------------------------------------------------------------------------------------------------------


def by_atheris(name: str, seconds: float) -> int:
    """Let atheris change bytes for so long in a process of its own; returns how many inputs it made."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(seeds(name)):
            Path(corpus, f"{number}").write_bytes(content)
        command = [sys.executable, "-m", "benchmarks.reliability.atheris_target", name, corpus]
        limits = [f"-max_total_time={round(seconds)}", f"-timeout={SLOWEST}", "-rss_limit_mb=0", "-max_len=20000"]
        found = subprocess.run([*command, *limits], capture_output=True, text=True, errors="replace")
        counts = re.findall(r"^#(\d+)\s", found.stderr, re.MULTILINE)
        if found.returncode:
            raise AssertionError(f"{name}: {found.stdout[-3000:]}\n{found.stderr[-3000:]}")
        return int(counts[-1])


def both(name: str) -> Result:
    """Let both engines work on it for SECONDS in all; a fault of either ends the check."""
    if name == "picture":  # what counts is what comes on top of the largest one that Pillow's limit lets through
        TASTERS[name](largest_picture())
    before = memory()
    counts = {"hypothesis": by_hypothesis(name, SECONDS / 2)}
    if name != "state":  # which is values, not bytes
        counts["atheris"] = by_atheris(name, SECONDS / 2)
    grown = memory() - before
    figures = ", ".join(f"{count:,} by {engine}" for engine, count in counts.items())
    return Result(sum(counts.values()), int(grown > GROWTH), f"{figures}, in {SECONDS:g} s; {grown:+.0f} MB")


def largest_picture() -> bytes:
    side, file = math.isqrt(Image.MAX_IMAGE_PIXELS or 0), io.BytesIO()
    Image.new("RGBA", (side, side)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TASTERS, "state", []], default=[])
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default="hypothesis")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    for name in args.names or [*TASTERS, "state"]:
        before = memory()
        count = (by_atheris if args.engine == "atheris" else by_hypothesis)(name, args.seconds)
        print(f"{name}: {count:,} inputs, memory grew by {memory() - before:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
