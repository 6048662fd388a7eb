"""Files and runs on disk, and how a script is stopped; needs no PyTorch."""

import contextlib
import difflib
import itertools
import json
import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli import UserError
from config import flatten, read_yaml

RUNS = Path("runs")
PRETRAINED = Path(__file__).parent / "pretrained" / "captioner.pth"  # what captions photographs before any training
LANGUAGES = {"en": PRETRAINED, "zh": PRETRAINED.with_name("captioner.zh.pth")}  # of the captioners there


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`, so that a crash or a full disk leaves either the old content or the new one.

    Raises UserError when the disk cannot take it; the old file is then still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # so that the new name, too, lasts through a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; make room there or choose another place") from None


def as_json(content: Any) -> bytes:
    """Return JSON in UTF-8; halves of characters, which file names and JSON may hold, are escaped."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode(errors="backslashreplace")


def unique_name(stem: str, taken: set[str]) -> str:
    """Return `stem`, numbered when a file from another folder has it; file systems may not tell cases apart."""
    numbered = (f"{stem}-{number}" for number in itertools.count(2))
    name = next(name for name in itertools.chain([stem], numbered) if name.lower() not in taken)
    taken.add(name.lower())
    return name


def find_run(needs: str, name: str | None = None, accept: Callable[[Path], bool] = lambda run: True) -> Path:
    """Return the run called `name` (or at that path), or the newest one to `accept`, that holds the file `needs`.

    Raises UserError when there is none.
    """
    if name is not None:
        for folder in (RUNS / name, Path(name)):
            if (folder / needs).is_file():
                return folder
        there = [] if (RUNS / name).is_dir() else [path.parent.name for path in RUNS.glob(f"*/{needs}")]
        near = difflib.get_close_matches(name, there, n=1)
        other = f"did you mean {near[0]}?" if near else f"name another run, or make it with: {how_to_make(name)}"
        raise UserError(f"{RUNS / name} holds no {needs}; {other}")
    found = [path for path in RUNS.glob(f"*/{needs}") if path.is_file() and accept(path.parent)]
    if not found:
        raise UserError(f"no run under {RUNS}/ holds a {needs}; make one with: python train.py")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def knows_photographs(run: Path) -> bool:
    """Whether a run learned from photographs, and not from the drawn shapes of the sample."""
    config = run / "config.yaml"
    return not config.is_file() or flatten(read_yaml(config)).get("data.format") != "sample"


def how_to_make(run: str) -> str:
    """Return the command that gets a run further: one that was begun, one with a recipe, or any other."""
    if (RUNS / run / "last.pth").is_file():
        return f"python train.py --resume --run {run}"
    recipe = Path(__file__).parent / "configs" / f"{run}.yaml"
    return f"python train.py --config configs/{run}.yaml" if recipe.is_file() else f"python train.py run={run}"


class StopRequest:
    """Remembers Ctrl-C or SIGTERM until the work at hand is whole; a second one acts at once.

    Use as `with StopRequest() as stop:` and ask `if stop.requested` where stopping is clean.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()
