"""Give the readers of other people's files anything there can be; all they may raise is a UserError in one sentence.

Hypothesis builds inputs that are nearly right. One that takes 10 seconds of the processor, or lets memory grow by 300
MB, is a fault, too.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import resource
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import SCENES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from stress.runs import SMALLEST

from captioning import shrink
from cli import UserError
from config import CONFIG_YAML, load_config
from data import formats, tars
from data.sample import describe
from data.transforms import Transform, open_picture
from data.vocab import build_vocab
from models.checkpoint import model_from_state, model_state
from models.model import CaptionModel
from render import gallery
from render.caption import draw_caption
from training.state import TrainState
from utils import CHECKPOINT_FORMAT, load_checkpoint

SLOWEST, LONGEST = 10, 60  # seconds of the processor for one input, and of the clock, on a busy machine
GROWTH = 300  # MB above what the imports take
ROOT, CORPUS = CONFIG_YAML.parent, Path(__file__).parent / "stress" / "corpus"


_exif = Image.Exif()
_exif.update({0x0112: 6, 0x010F: "maker", 0x829A: (1, 125), 0x9003: "2026:01:01 00:00:00", 0x927C: bytes(9)})
EXIF = _exif.tobytes()  # turned to the right, and more that cameras write


def from_file(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """Return a reader of bytes, for a function that reads a file."""

    def reader(content: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            Path(folder, "input").write_bytes(content)
            read(Path(folder, "input"))

    return reader


def read_picture(path: Path) -> None:
    picture = open_picture(path)
    Transform(64).resize(picture)
    draw_caption(shrink(picture), path.read_bytes()[-200:].decode(errors="surrogateescape"))


def read_checkpoint(path: Path) -> None:
    saved = load_checkpoint(path)
    model = model_from_state(saved, str(path))
    if "optimiser" in saved:
        TrainState(model).restore(saved, path)


def draw_text(content: bytes) -> None:
    encoding, errors = ("utf-16", "surrogatepass") if len(content) % 2 == 0 else ("utf-8", "replace")
    text, size = content.decode(encoding, errors=errors), (1 + (content + bytes(2))[0], 1 + (content + bytes(2))[1])
    draw_caption(Image.new("RGB", size), text)
    name = os.fsdecode(content)  # as files can be called
    gallery.page(text, text, [gallery.row(name, [text], [text], size=size, name=name)]).encode()


TEXTS = [name for name in formats.READERS if name not in ("sample", "texts")]  # formats of files


def read_tar(path: Path) -> None:
    for key, _, sample in tars.samples(path):
        tars.read_sample(key, sample, path)


def small_tar(mode: str, name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for number in range(2):
            for ending, content in (("jpg", b"a picture"), ("json", b'{"captions": ["A dog."], "split": "val"}')):
                member = tarfile.TarInfo(f"{name}{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


READERS: dict[str, Callable[[Any], object]] = {
    "config": from_file(load_config),
    "override": lambda content: load_config(overrides=content.decode(errors="replace").split("\n")[:5]),
    **{name: from_file(partial(formats.read, name=name)) for name in TEXTS},
    "recognised": from_file(formats.read),
    "tar": from_file(read_tar),
    "checkpoint": from_file(read_checkpoint),
    "last": from_file(read_checkpoint),
    "picture": from_file(read_picture),
    "drawer": draw_text,
}


def check(name: str, content: Any) -> None:
    """Give an input to a reader; raises what is a fault of the reader."""
    began, worked = time.monotonic(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                patch("socket.create_connection", side_effect=OSError("none")),
            ):
                READERS[name](content)
    except UserError as error:
        assert len(str(error)) <= 2000, f"a message of {len(str(error))} characters"
    except OSError:  # of which the scripts say what the system says; one picture's would end a whole folder's captions
        if name == "picture":
            raise
    took, work = time.monotonic() - began, time.process_time() - worked
    assert work < SLOWEST and took < LONGEST, f"took {took:.0f} s, {work:.0f} of the processor"


def memory() -> float:
    """Return the most MB that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@st.composite
def with_flipped_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw the same with up to four other bytes, in place: most that lies behind them is still understood."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4)) if content else 0):
        changed[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 13) | st.integers(0, 255))
    return bytes(changed)


@functools.cache
def tiny_captioner() -> CaptionModel:
    """A captioner whose backbone is not in its file, but comes with pip."""
    vocab = build_vocab([caption for scene in SCENES for caption in describe(scene)], 1)
    words = [*SMALLEST, "encoder.name=efficientnet_lite0", "encoder.weights=pretrained"]
    return CaptionModel.build(load_config(overrides=words), vocab)


def training_state() -> dict[str, Any]:
    """What last.pth holds after a step."""
    state = TrainState(tiny_captioner())
    for weight in state.ema.trained:
        weight.grad = torch.ones_like(weight)
    state.optimiser.step()
    state.count_step(10, torch.tensor(2.0))
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder, "last.pth"))
        return load_checkpoint(Path(folder, "last.pth"))


def saved_if_it_can_be(state: Any) -> bytes:
    """Return a checkpoint of a changed state, or nothing where it is no dict any more."""
    return saved(state) if isinstance(state, dict) else b""


def saved(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state | {"format": CHECKPOINT_FORMAT}, buffer)
    return buffer.getvalue()


@functools.cache
def pictures() -> list[bytes]:
    """Return a small picture of each mode in each format that Pillow can write, with EXIF where it fits."""
    Image.init()
    found = list[bytes]()
    for kind, mode in itertools.product(sorted(Image.SAVE), ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F")):
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):  # of a format that has no such pictures
            Image.new(mode, (9, 6)).save(buffer, kind, exif=EXIF)
            found.append(buffer.getvalue())
    return found


@st.composite
def nearly_right_pictures(draw: st.DrawFn) -> bytes:
    """Draw a picture with other bytes: anywhere, or in its EXIF; the checksums of a PNG are then right again."""
    content, change = draw(st.sampled_from(pictures())), draw(st.sampled_from([with_other_bytes, with_flipped_bytes]))
    in_exif = EXIF[6:] in content and draw(st.booleans())
    changed = content.replace(EXIF[6:], draw(change(EXIF[6:]))) if in_exif else draw(change(content))
    return with_checksums(changed) if draw(st.booleans()) else changed


def with_checksums(png: bytes) -> bytes:
    """Return a PNG with the checksum of each chunk; other content as it is."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    fixed, rest = png[:8], png[8:]
    while len(rest) >= 12:
        length = int.from_bytes(rest[:4])
        chunk = rest[4 : 8 + length]
        fixed += rest[:4] + chunk + zlib.crc32(chunk).to_bytes(4)
        rest = rest[12 + length :]
    return fixed + rest


def right_inputs(name: str) -> list[Any]:
    """Return inputs without a mistake, to be changed: those in corpus/, or what this project writes itself."""
    if name == "config":
        return [path.read_bytes() for path in [CONFIG_YAML, *ROOT.glob("configs/*.yaml")]]
    if name in ("checkpoint", "last"):
        return [saved(training_state() if name == "last" else model_state(tiny_captioner()))]
    if name == "tar":
        kinds = itertools.product(("w", "w:gz", "w:bz2", "w:xz"), ("", "folder/", "é" * 200))
        return [small_tar(mode, name) for mode, name in kinds]
    folders = [CORPUS / kind for kind in (TEXTS if name == "recognised" else [name])]
    return [path.read_bytes() for folder in folders for path in sorted(folder.glob("*"))]


TEXT = st.text(max_size=20) | st.sampled_from(["train", "a.jpg", "A dog.", "../a", "\ud800", "1e999", ""])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TENSOR = st.sampled_from([torch.zeros(()), torch.ones(3), torch.full((2, 2), float("nan")), torch.arange(4).view(2, 2)])
ANY = st.recursive(
    PLAIN, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3), max_leaves=8
)


@st.composite
def with_other_part(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """Draw the value with something else in the place of one of its parts, at any depth."""
    if isinstance(value, torch.Tensor) and draw(st.booleans()):
        return draw(st.sampled_from([value.double(), value[:1] if value.ndim else value[None], value - 1e30, -value]))
    if depth > 4 or not isinstance(value, (dict, list)) or not value or (depth and draw(st.integers(0, 4)) == 0):
        return draw(ANY | TENSOR if isinstance(value, torch.Tensor) else ANY)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    copy = value.copy()
    if isinstance(value, dict) and draw(st.integers(0, 9)) == 0:
        del copy[key]
    else:
        copy[key] = draw(with_other_part(value[key], depth + 1))
    return copy


@st.composite
def with_other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    first = draw(st.integers(0, len(content)))
    last = draw(st.integers(first, min(len(content), first + 40)))
    between = draw(st.binary(max_size=40) | TEXT.map(lambda text: text.encode(errors="replace")))
    return content[:first] + between + content[last:]


def nearly_right_inputs(name: str) -> st.SearchStrategy[Any]:
    if name == "picture":
        return st.binary(max_size=200) | nearly_right_pictures()
    right = right_inputs(name)
    strategies = [st.binary(max_size=200), *map(with_other_bytes, right)]
    if name in ("checkpoint", "last"):
        state = training_state() if name == "last" else model_state(tiny_captioner())
        strategies += [with_flipped_bytes(right[0]), with_other_part(state).map(saved_if_it_can_be)]
    if name == "tar":
        strategies.append(
            st.tuples(st.sampled_from(right), st.integers(0, len(right[-1]))).map(lambda cut: cut[0][: cut[1]])
        )
    if name in ("karpathy", "coco", "json", "jsonl"):
        values = with_other_part(json.loads(right[0]))
        strategies += [values.map(lambda value: json.dumps(value).encode(errors="surrogatepass"))] * 2
    return st.one_of(strategies)


def check_inputs(name: str, examples: int = 100, again: bool = False) -> int:
    """Check so many inputs, the same ones each time if `again`; Hypothesis shrinks and shows a fault."""
    count, quiet = 0, list(HealthCheck)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet, derandomize=again)
    @given(nearly_right_inputs(name))
    def check_each(content: Any) -> None:
        nonlocal count
        count += 1
        check(name, content)

    check_each()
    return count
