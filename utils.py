"""Small, boring things every script needs: files and runs on disk, checkpoints, the device, seeds, how a script stops.

PyTorch is imported by the functions that need it, so that scripts can answer mistakes before.
"""

import contextlib
import difflib
import io
import json
import os
import platform
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cli import UserError, say
from cli.safe_load import DAMAGED, safe_load
from config import flatten, read_yaml

if TYPE_CHECKING:
    import torch

RUNS = Path("runs")
PRETRAINED = Path(__file__).parent / "pretrained" / "captioner.pth"  # what captions photographs before any training
PATIENCE = 1  # seconds until a lock counts as held: a process that was killed may take a moment to end
LANGUAGES = {"en": PRETRAINED, "zh": PRETRAINED.with_name("captioner.zh.pth")}  # of the captioners there
LONGEST_NAME = 255  # bytes of a file's name, on nearly all systems
CHECKPOINT_FORMAT = "image-captioning/2"
# oneDNN keeps the kernels of the last 1,024 shapes, a gigabyte: batches differ in shape, but hardly in more than these.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "400")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`, so that a crash or a full disk leaves either the old content or the new one.

    Raises UserError when the disk cannot take it; the old file is then still there.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no file but a folder, a pipe or a device; choose another place")
    mark = f".{secrets.token_hex(4)}"
    temporary = path.with_name(f".{cut_name(path.name, LONGEST_NAME - len(mark) - 1)}{mark}")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_names(path.parent)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; make room there or choose another place") from None


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that they last through a power cut."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        flush_names(each.parent)


def flush_names(folder: Path) -> None:
    """Flush the names in a folder to the disk: those that are new, and those that are gone."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def as_json(content: Any) -> bytes:
    """Return JSON in UTF-8; halves of characters, which file names and JSON may hold, are escaped."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode(errors="backslashreplace")


def unique_name(stem: str, taken: dict[str, int], ending: str = "") -> str:
    """Return `stem` and `ending`, numbered when a file from another folder has that name; file systems may not tell
    cases apart. It does not begin with a dot, and a suffix of up to 15 bytes, such as .jpg, has room behind it.

    `taken` are the names so far, in lower case, each with the number that the next of this name tries first: thousands
    of folders may hold an 0001.jpg.
    """
    stem = stem.lstrip(".") or "picture"
    name = plain = cut_name(stem, LONGEST_NAME - 15 - len(ending)) + ending
    number = taken.get(plain.lower(), 2)
    while name.lower() in taken:
        numbered = f"{ending}-{number}"
        name, number = cut_name(stem, LONGEST_NAME - 15 - len(numbered)) + numbered, number + 1
    taken[name.lower()] = 2
    taken[plain.lower()] = number
    return name


def cut_name(name: str, most: int) -> str:
    """Return a file's name without what is beyond so many bytes of UTF-8, cut between characters."""
    while len(name.encode(errors="surrogatepass")) > most:
        name = name[:-1]
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
    """Remembers Ctrl-C, SIGTERM or the end of its terminal (SIGHUP, unless `nohup` said to ignore that) until the work
    at hand is whole; a second one acts at once.

    Use as `with StopRequest() as stop:` and ask `if stop.requested` where stopping is clean.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
        self.__exit__()


@contextlib.contextmanager
def hold(path: Path, doing: str, advice: str = "") -> Iterator[None]:
    """Hold the lock file `path` until the block or the process ends.

    Where another process holds it, its number and machine and what it is `doing` are said, and its end is awaited; or,
    with an `advice`, UserError is raised.
    """
    make_folder(path.parent)
    lock, holder = FileLock(path), path.with_name(f"{path.name}-holder")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        who = "another process"
        with contextlib.suppress(OSError), open(holder, encoding="utf-8", errors="replace") as file:
            who += f" ({file.read(200)})"
        if advice:
            raise UserError(f"{who} is {doing}; {advice}") from None
        say(f"{who} is {doing}: waiting for its end")
        lock.acquire()
    try:
        holder.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain values and tensors as one file, atomically; raises UserError when the disk is full."""
    import torch

    buffer = io.BytesIO()
    torch.save(on_cpu(checkpoint) | {"format": CHECKPOINT_FORMAT}, buffer)
    write_atomically(Path(path), buffer.getvalue())


def on_cpu(values: Any) -> Any:
    """Return what a checkpoint holds with all tensors on the CPU: a file that names a GPU is read only where there is
    one.
    """
    if isinstance(values, dict):
        return {name: on_cpu(each) for name, each in values.items()}
    if isinstance(values, list):
        return [on_cpu(each) for each in values]
    return values.cpu() if hasattr(values, "cpu") else values


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file written by `save_checkpoint`, tensors on the CPU; nothing in it is executed.

    Raises UserError for a file that is missing, cut short, of an older version, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; check the path, or train one with: python train.py")
    checkpoint = None
    with contextlib.suppress(*DAMAGED):
        checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project ({CHECKPOINT_FORMAT}), or was cut short; take another one, or "
            "train again"
        )
    return checkpoint


def pick_device() -> "torch.device":
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(precision: str, device: "torch.device") -> "torch.dtype":
    """Resolve `auto`: bf16 on hardware that multiplies it natively, float32 elsewhere."""
    import torch

    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Draw all noise of a step from (seed, step, rank) alone, so that a run can be taken up at any step."""
    import numpy as np
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0]))
